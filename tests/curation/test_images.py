"""Bad images are set aside with their reasons; sources give stable ids and never leave their root."""

import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from caprl_utils.config import load_profile
from caprl_utils.curation.checks import MAX_DISTANCE, DuplicateFinder, check_image, perceptual_hash
from caprl_utils.curation.images import BadImage, ImageItem, decode, open_images
from caprl_utils.curation.sources import RawImage
from caprl_utils.errors import UserError


def picture(seed: int, size: tuple[int, int] = (128, 96)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size)


def as_bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def huge_png() -> bytes:
    """A valid header of 10,000 x 10,000 pixels and hardly any data: nothing else is needed to refuse it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = (10_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\x00"))


GOOD = as_bytes(picture(0))
BAD = {
    "empty.png": (b"", BadImage.EMPTY),
    "text.png": (b"this is no image at all", BadImage.NOT_AN_IMAGE),
    "truncated.png": (GOOD[: len(GOOD) // 2], BadImage.TRUNCATED),
    "truncated.jpg": (as_bytes(picture(1), "JPEG")[:600], BadImage.TRUNCATED),
    "huge.png": (huge_png(), BadImage.TOO_LARGE),
    "narrow.png": (as_bytes(Image.new("RGB", (1000, 4))), BadImage.TOO_NARROW),
    "animated.gif": (
        as_bytes(picture(0), "GIF", save_all=True, append_images=[picture(1)]),
        BadImage.ANIMATED,
    ),
    "cmyk.jpg": (as_bytes(picture(0).convert("CMYK"), "JPEG"), BadImage.CMYK),
    "extension.jpg": (GOOD, BadImage.WRONG_EXTENSION),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_set_aside_with_its_reason(name):
    data, reason = BAD[name]
    item = decode(RawImage(name, data, name))
    assert item.problem == reason
    assert item.image is None


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "I", "F"])
def test_every_other_mode_becomes_rgb(mode):
    gray = picture(0).convert("L")
    deep = Image.fromarray(np.asarray(gray, dtype=np.uint16) * 256)
    image = deep if mode == "I;16" else gray.convert(mode)
    data = as_bytes(image, "TIFF" if mode in ("F", "I") else "PNG")
    shown = decode(RawImage("x", data)).image
    assert shown.mode == "RGB"
    assert np.asarray(shown.convert("L")).std() > 20


def test_transparent_places_are_white():
    image = picture(0).convert("RGBA")
    image.putalpha(0)
    assert decode(RawImage("x", as_bytes(image))).image.getextrema() == ((255, 255),) * 3


def fill(folder: Path) -> None:
    (folder / "charts").mkdir(parents=True)
    for name, (data, _) in BAD.items():
        (folder / name).write_bytes(data)
    (folder / "charts" / "good.png").write_bytes(GOOD)
    (folder / "notes.txt").write_text("no image")


def test_a_folder_with_everything_bad_in_it(tmp_path):
    folder = tmp_path / "images"
    fill(folder)
    (tmp_path / "secret.png").write_bytes(GOOD)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "dangling.png").symlink_to(folder / "nothing.png")
    found = {item.id: item for item in open_images(load_profile("smoke", {"images.source": str(folder)}))}
    assert {name: item.problem for name, item in found.items()} == {
        **{name: reason for name, (_, reason) in BAD.items()},
        "link.png": BadImage.OUTSIDE,
        "dangling.png": BadImage.UNREADABLE,
        "charts/good.png": None,
    }
    assert found["charts/good.png"].kind == "charts"
    assert found["charts/good.png"].encoded() == GOOD


def test_parquet_and_tar_sources(tmp_path):
    rows = [
        {"id": "a", "image": {"bytes": GOOD, "path": "a.png"}, "kind": "chart"},
        {"id": "b", "image": {"bytes": None, "path": "../outside.png"}, "kind": "chart"},
        {"id": "c", "image": {"bytes": GOOD, "path": None}, "kind": "scene"},
    ]
    (tmp_path / "outside.png").write_bytes(GOOD)
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), data / "set.parquet")
    settings = {"images.source": str(data / "set.parquet")}
    assert [(i.id, i.problem) for i in open_images(load_profile("smoke", settings))] == [
        ("a", None),
        ("b", BadImage.OUTSIDE),
        ("c", None),
    ]
    charts = load_profile("smoke", settings | {"images.kinds": ["chart"], "images.num_images": 1})
    assert [item.id for item in open_images(charts)] == ["a"]
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for name in ("0.png", "0.json", "1.png"):
            info = tarfile.TarInfo(name)
            info.size = len(GOOD)
            archive.addfile(info, io.BytesIO(GOOD))
    shard = load_profile("smoke", {"images.source": str(tmp_path / "shard.tar")})
    assert [item.id for item in open_images(shard)] == ["shard/0.png", "shard/1.png"]


def test_sources_that_are_not_there(tmp_path):
    cases = ((str(tmp_path / "none"), "no "), ("./none.parquet", "no "), (__file__, "neither"))
    for source, problem in cases:
        with pytest.raises(UserError, match=problem):
            next(open_images(load_profile("smoke", {"images.source": source})))


def test_small_plain_and_copied_images():
    finder, benchmarks = DuplicateFinder(), DuplicateFinder()
    first = check_image(ImageItem("first", picture(0)), finder, benchmarks)
    assert first.reason is None
    benchmarks.add("benchmark 7", perceptual_hash(picture(5)))
    cases = {
        "copy": (picture(0), BadImage.DUPLICATE, "first"),
        "scaled": (picture(0, (256, 192)), BadImage.DUPLICATE, "first"),
        "jpeg": (Image.open(io.BytesIO(as_bytes(picture(0), "JPEG"))), BadImage.DUPLICATE, "first"),
        "test image": (picture(5), BadImage.BENCHMARK, "benchmark 7"),
        "small": (picture(1, (40, 200)), BadImage.TOO_SMALL, "40 x 200"),
        "plain": (Image.new("RGB", (100, 100), "grey"), BadImage.TOO_PLAIN, "grey values spread by 0.0"),
        "other": (picture(2), None, None),
    }
    for name, (image, reason, detail) in cases.items():
        row = check_image(ImageItem(name, image), finder, benchmarks)
        assert (row.reason, row.detail) == (reason, detail), name


def test_every_hash_within_the_distance_is_found():
    rng = np.random.default_rng(0)
    finder = DuplicateFinder()
    finder.add("it", "0" * 64)
    for _ in range(200):
        bits = sum(1 << int(bit) for bit in rng.choice(256, MAX_DISTANCE, replace=False))
        assert finder.nearest(f"{bits:064x}") == "it"
        far = bits | sum(1 << int(bit) for bit in rng.choice(256, 40, replace=False))
        assert finder.nearest(f"{far:064x}") is None
