"""One way to open an image, and every source of images: what is refused, in which order, and what stays closed."""

import io
import json
import os
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from caprl_utils import images
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.images import (
    BadImage,
    BadImageError,
    ImageItem,
    fingerprint,
    open_image,
    open_images,
    read_source,
)  # fmt: skip


def picture(seed: int, size: tuple[int, int] = (128, 96)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size)


def as_bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def huge_png() -> bytes:
    """A valid header of 10,001 x 10,001 pixels and hardly any data: nothing else is needed to refuse it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = (10_001).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
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
    item = ImageItem(name, lambda: data, path=name)
    assert item.problem == reason
    assert item.image is None
    with pytest.raises(BadImageError, match=reason):
        item.open()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "I", "F"])
def test_every_other_mode_becomes_rgb(mode):
    gray = picture(0).convert("L")
    deep = Image.fromarray(np.asarray(gray, dtype=np.uint16) * 256)
    image = deep if mode == "I;16" else gray.convert(mode)
    data = as_bytes(image, "TIFF" if mode in ("F", "I") else "PNG")
    shown = open_image(data)
    assert shown.mode == "RGB"
    assert np.asarray(shown.convert("L")).std() > 20


def test_transparent_places_are_white():
    image = picture(0).convert("RGBA")
    image.putalpha(0)
    assert open_image(as_bytes(image)).getextrema() == ((255, 255),) * 3


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


NAMES = ("a/x.png", "a/z/1.PNG", "a-b/y.jpg", "a.png", "b.webp")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for name in (*NAMES, "notes.md", ".hidden"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def ids(source, kinds=None):
    return [image.id for image in read_source(str(source), kinds)]


def test_a_folder_is_walked_in_the_order_of_sorted_paths(folder):
    (folder / "loop").symlink_to(folder)
    (folder / "link.png").symlink_to(folder / "a")
    found = list(images._Place.of(str(folder)).walk())
    assert found == [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*"))
                     if not p.is_dir() or p.is_symlink()]  # fmt: skip
    assert ids(folder) == list(NAMES)
    assert ids(folder, ["a"]) == ["a/x.png", "a/z/1.PNG"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_closed_folder_is_named(folder):
    (folder / "a").chmod(0)
    with pytest.raises(UserError, match=r"images/a cannot be read: permission denied"):
        list(images._Place.of(str(folder)).walk())
    (folder / "a").chmod(0o755)


def test_the_hash_of_a_folder_changes_with_its_files_and_not_with_its_place(folder, tmp_path):
    before = fingerprint(str(folder))
    (folder / "nowhere.png").symlink_to(folder / "none")
    assert fingerprint(str(folder)) == before
    moved = folder.rename(tmp_path / "moved")
    assert fingerprint(str(moved)) == before
    (moved / "a" / "new.png").write_bytes(b"x")
    changed = fingerprint(str(moved))
    (moved / "a" / "new.png").rename(moved / "a" / "newer.png")
    assert len({before, changed, fingerprint(str(moved))}) == 3
    assert fingerprint("someone/data") != fingerprint("someone/other")


def test_only_the_names_of_one_folder_are_held(tmp_path, monkeypatch):
    """100 folders of 100 files: the peak is that of one folder, far below that of 10,000 names."""
    for number in range(100):
        (tmp_path / f"{number:03d}").mkdir()
        for name in range(100):
            (tmp_path / f"{number:03d}" / f"{name:03d}.png").touch()
    fingerprint(str(tmp_path))
    tracemalloc.start()
    try:
        fingerprint(str(tmp_path))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


LISTS = {
    "list.txt": "b.webp\n\na/x.png\n",
    "list.jsonl": '{"image": "b.webp", "caption": "x"}\n{"images": ["a/x.png"]}\n',
    "list.csv": 'image_path,label\nb.webp,"1, 2"\na/x.png,2\n',
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_names_images_below_its_folder(folder, name):
    (folder / name).write_text(LISTS[name])
    assert ids(folder / name) == ["b.webp", "a/x.png"]
    assert ids(folder / name, ["a"]) == ["a/x.png"]
    before = fingerprint(str(folder / name))
    (folder / "a.png").write_bytes(b"another")  # not in the list
    assert fingerprint(str(folder / name)) == before
    (folder / "b.webp").write_bytes(b"another one")
    assert fingerprint(str(folder / name)) != before


def test_what_a_list_names_outside_or_nowhere_has_its_problem(folder):
    file = folder / "list.jsonl"
    (folder.parent / "secret.png").write_bytes(b"x")
    paths = (
        "../secret.png",
        str(folder.parent / "secret.png"),
        "none.png",
        "nul\0.png",
        str(folder / "a.png"),
    )
    file.write_text("".join(json.dumps({"path": path}) + "\n" for path in paths))
    outside, nowhere = BadImage.OUTSIDE, BadImage.UNREADABLE
    found = [image.problem for image in read_source(str(file))]
    assert found == [outside, outside, nowhere, nowhere, BadImage.NOT_AN_IMAGE]
    assert fingerprint(str(file))


@pytest.mark.parametrize(
    "name, text, message",
    [
        (
            "a.jsonl",
            '{"image": "b.webp"}\n{"video": "x"}\n',
            r"a\.jsonl, row 2 names no image; .* image_path",
        ),
        ("a.jsonl", "{oops\n", "row 1 names no image"),
        ("a.csv", "name\nx\n", "row 1 names no image"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
        ("a.md", "x", r"neither a folder .* nor a list of paths \(.txt, .jsonl, .csv\)"),
    ],
)
def test_a_list_without_paths_is_refused(folder, name, text, message):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        ids(folder / name)


def test_a_source_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"no .*none\.csv; name a folder, .* list of paths"):
        ids(Path("/nowhere/none.csv"))
