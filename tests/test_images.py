"""One way to open an image, and every source of images: what is refused, in which order, and what stays closed."""

import gzip
import io
import json
import os
import tarfile
import tracemalloc
import zlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from caprl_utils import image_sources
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.image_sources import fingerprint, open_images, read_source, unique
from caprl_utils.images import BadImage, ImageItem, as_rgb, encode, fit, open_image


def picture(seed: int, size: tuple[int, int] = (128, 96)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size)


def as_bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def huge_png() -> bytes:
    """A valid header of 12,001 x 12,001 pixels and hardly any data: nothing else is needed to refuse it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = (12_001).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\x00"))


GOOD = as_bytes(picture(0))
BAD = {
    "empty.png": (b"", BadImage.EMPTY),
    "text.png": (b"this is no image at all", BadImage.NOT_AN_IMAGE),
    "truncated.png": (GOOD[: len(GOOD) // 2], BadImage.TRUNCATED),
    "truncated.jpg": (as_bytes(picture(1), "JPEG")[:600], BadImage.TRUNCATED),
    "huge.png": (huge_png(), BadImage.TOO_LARGE),
    "narrow.png": (as_bytes(Image.new("RGB", (1000, 4))), BadImage.TOO_NARROW),
    "moving.gif": (as_bytes(picture(0), "GIF", save_all=True, append_images=[picture(1)]), BadImage.ANIMATED),
    "drawing.svg": (b"<svg/>", BadImage.NOT_AN_IMAGE),
}


# one opener


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_set_aside_with_its_reason(name):
    data, reason = BAD[name]
    item = ImageItem(name, lambda: data, path=name)
    assert item.problem.reason == reason and item.image is None


def turned(kind: int, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = kind
    return as_bytes(picture(0), "JPEG", exif=exif, **options)


BROKEN_EXIF = (  # orientation 6, and a rational of -1/0
    b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\x1a\x01\n\0\x01\0\0\0\x26\0\0\0\0\0\0\0"
    b"\xff\xff\xff\xff\0\0\0\0"
)


def pages() -> dict:
    return {"save_all": True, "append_images": [picture(1)]}


USUAL = {  # what viewers show and a captioner is to see, whatever its name says
    "cmyk.jpg": as_bytes(picture(0).convert("CMYK"), "JPEG"),
    "webp.jpg": as_bytes(picture(0), "WEBP", lossless=True),
    "phone.jpg": as_bytes(picture(0), "MPO", **pages()),
    "pages.tif": as_bytes(picture(0), "TIFF", **pages()),
    "a.avif": as_bytes(picture(0), "AVIF"),
    "a.jp2": as_bytes(picture(0), "JPEG2000"),
    "still.gif": as_bytes(picture(0), "GIF"),
    "a.ppm": as_bytes(picture(0), "PPM"),
    "a.tga": as_bytes(picture(0), "TGA"),
    "Screenshot at 10.15.33": GOOD,
}


@pytest.mark.parametrize("name", USUAL)
def test_usual_pictures_are_opened_by_their_content(name):
    shown = ImageItem(name, lambda: USUAL[name], path=name).open()
    assert shown.mode == "RGB" and shown.size == (128, 96)
    assert np.abs(np.asarray(shown, int) - np.asarray(picture(0), int)).mean() < 12


@pytest.mark.parametrize("kind", range(1, 9))
def test_pictures_stand_upright_once(kind):
    data = turned(kind)
    wanted = (96, 128) if kind > 4 else (128, 96)
    shown = open_image(data)
    assert shown.size == as_rgb(shown).size == wanted and as_rgb(Image.open(io.BytesIO(data))).size == wanted
    assert open_image(data, max_pixels=3072).size == tuple(side // 2 for side in wanted)
    assert open_image(encode(shown)[0]).size == wanted
    assert open_image(as_bytes(picture(0), "JPEG", exif=BROKEN_EXIF)).size == (96, 128)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "PA", "1", "I;16", "I;16B", "I", "F", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    grey = picture(0).convert("L")
    if "16" in mode:
        deep = np.asarray(grey, ">u2" if mode == "I;16B" else "<u2") * 200
        image = Image.frombytes(mode, grey.size, deep.tobytes())
    else:
        image = picture(0).quantize(16).convert("PA") if mode == "PA" else grey.convert(mode)
    shown = as_rgb(image)
    assert shown.mode == "RGB" and np.asarray(shown.convert("L")).std() > 20


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_places_are_white_in_every_mode(mode):
    image = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    ImageDraw.Draw(image).text((5, 5), "BLACK", fill=(0, 0, 0, 255))
    data = as_bytes(image.convert(mode) if mode != "P" else image.quantize(8))
    shown = np.asarray(open_image(data).convert("L"))
    assert shown[-1].min() == 255 and shown.min() < 60
    assert np.array_equal(np.asarray(open_image(encode(open_image(data))[0]).convert("L")), shown)


def test_large_pictures_are_scaled_once_and_plain_files_are_sent_as_they_are():
    data = as_bytes(picture(0, (4000, 3000)), "JPEG")
    whole = open_image(data)
    assert encode(whole) == (data, "image/jpeg") and fit(whole, 1003520).size == (1156, 867)
    small = open_image(data, max_pixels=1003520)
    assert small.size == (1156, 867) and encode(small)[1] == "image/png" and fit(small, 1003520) is small
    assert encode(whole.resize((40, 30)))[1] == encode(open_image(turned(6)))[1] == "image/png"


# folders


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for name in ("a/x.png", "a/z/1.PNG", "a-b/y.jpg", "a.png", "b.webp", "notes.md", ".hidden", ".git/x.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


NAMES = ["a/x.png", "a/z/1.PNG", "a-b/y.jpg", "a.png", "b.webp"]


def ids(source, kinds=None, passed=None):
    return [image.id for image in read_source(str(source), kinds, passed)]


def test_a_folder_is_walked_in_the_order_of_sorted_paths_and_what_is_passed_over_is_counted(folder):
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "hash").write_bytes(GOOD)
    (folder / "LICENSE").touch()
    os.mkfifo(folder / "pipe.png")
    passed = Counter()
    assert ids(folder, passed=passed) == [*NAMES, "hash"]
    assert passed == {".md": 1, "hidden": 2, "link to a folder above it": 1, "without suffix": 1, "no file": 1}
    assert ids(folder, ["a"]) == ["a/x.png", "a/z/1.PNG"]
    (folder / "only").mkdir()
    (folder / "only" / "x.md").touch()
    with pytest.raises(UserError, match=r"no image in .*; passed over: 1 .md"):
        ids(folder / "only")


def test_links_are_followed_and_those_to_nowhere_are_named(folder, tmp_path):
    """As the snapshots of Hugging Face's cache link into its blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(GOOD)
    (folder / "linked").symlink_to(tmp_path / "blobs")
    (folder / "link.png").symlink_to(tmp_path / "blobs" / "abc")
    (folder / "dangling.png").symlink_to(folder / "nothing.png")
    found = {item.id: item.problem for item in read_source(str(folder))}
    assert found["linked/abc"] is found["link.png"] is None
    assert found["dangling.png"].reason == BadImage.UNREADABLE


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_closed_folder_is_passed_over_and_told(folder):
    (folder / "a").chmod(0)
    passed = Counter()
    assert ids(folder, passed=passed) == NAMES[2:] and f"closed folder {folder / 'a'}" in passed
    (folder / "a").chmod(0o755)


def test_a_name_that_is_no_text_is_set_aside(folder):
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:
        file.write(GOOD)
    found = {item.id: item.problem for item in read_source(str(folder))}
    assert found["caf\\udce9.png"].reason == BadImage.NAME and len(found) == len(NAMES) + 1


def test_the_hash_of_a_folder_changes_with_its_images_and_with_nothing_else(folder, tmp_path):
    before = fingerprint(str(folder))
    (folder / "notes.md").write_text("more")
    (folder / ".DS_Store").touch()
    os.utime(folder / "a.png")
    moved = folder.rename(tmp_path / "moved")
    assert fingerprint(str(moved)) == before
    (moved / "a" / "new.png").write_bytes(b"x")
    changed = fingerprint(str(moved))
    (moved / "a" / "new.png").rename(moved / "a" / "newer.png")
    assert len({before, changed, fingerprint(str(moved))}) == 3
    assert fingerprint("someone/data") != fingerprint("someone/other")


def test_only_the_names_of_one_folder_are_held(tmp_path):
    """40 folders of 100 files: the peak is that of one folder, far below that of 4,000 names."""
    for number in range(40):
        (tmp_path / f"{number:03d}").mkdir()
        for name in range(100):
            (tmp_path / f"{number:03d}" / f"{name:03d}.png").touch()
    fingerprint(str(tmp_path))
    tracemalloc.start()
    fingerprint(str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_a_relative_folder_starts_at_the_working_folder_or_the_repository(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("caprl_utils.paths.HOME", tmp_path)
    monkeypatch.chdir(folder / "a")
    assert ids("images") == NAMES and ids("../a/z") == ["1.PNG"]


# tables and tars


def tar_of(members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in members:
            info = tarfile.TarInfo(name)
            info.size = len(GOOD)
            archive.addfile(info, io.BytesIO(GOOD))
    return buffer.getvalue()


def test_parquet_rows_and_their_kinds(tmp_path):
    rows = [
        {"id": "a", "image": {"bytes": GOOD, "path": "a.png?width=5"}, "kind": "chart"},
        {"id": "b", "image": {"bytes": None, "path": "../outside.png"}, "kind": "chart"},
        {"id": "c", "image": None, "kind": "scene"},
        {"id": "a", "image": {"bytes": GOOD, "path": None}, "kind": "scene"},
    ]
    (tmp_path / "outside.png").write_bytes(GOOD)
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "set.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    settings = {"images.source": str(file)}
    found = {item.id: item.problem for item in open_images(load_profile("smoke", settings))}
    assert list(found) == ["a", "b", "c", "a (set.parquet#3)"]
    reasons = [None, BadImage.OUTSIDE, BadImage.EMPTY, BadImage.SAME_ID]
    assert [error and error.reason for error in found.values()] == reasons
    charts = load_profile("smoke", settings | {"images.kinds": ["chart"], "images.num_images": 1})
    assert [item.id for item in open_images(charts)] == ["a"]


CELLS = {
    "bytes": GOOD, "path": "x.png", "struct": {"bytes": GOOD, "path": None}, "struct of a path": {"path": "x.png"},
    "bytes only": {"bytes": GOOD}, "list": [{"bytes": GOOD, "path": None}] * 2, "paths": ["x.png", "x.png"],
}  # fmt: skip


@pytest.mark.parametrize("column", ["image", "images", "img"])
@pytest.mark.parametrize("kind", CELLS)
def test_every_form_of_a_cell_is_read(tmp_path, kind, column):
    (tmp_path / "x.png").write_bytes(GOOD)
    pq.write_table(pa.table({"text": ["t", "t"], column: [CELLS[kind]] * 2}), tmp_path / "t.parquet")
    found = list(read_source(str(tmp_path / "t.parquet")))
    assert len(found) == (4 if isinstance(CELLS[kind], list) else 2) == len({item.id for item in found})
    assert all(item.problem is None for item in found)


def test_a_damaged_or_other_table_is_named(tmp_path):
    file = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": ["x"], "image": [3]}), file)
    with pytest.raises(UserError, match=r"t\.parquet has no column `image`; its columns: text, image"):
        ids(file)
    pq.write_table(pa.table({"image": [GOOD] * 9}), file)
    data = file.read_bytes()
    file.write_bytes(data[:200] + b"\0" * 300 + data[500:])
    found = {item.problem.reason for item in read_source(str(file)) if item.problem}
    assert found <= {BadImage.UNREADABLE, BadImage.TRUNCATED}
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"t\.parquet is no parquet file that can be read"):
        ids(file)


def test_tars_are_read_to_their_end_or_named(tmp_path):
    file, data, passed = tmp_path / "t.tar", tar_of(["0.png", "0.json", "._0.png", "1.jfif"]), Counter()
    file.write_bytes(data)
    assert ids(file, passed=passed) == ["t/0.png", "t/1.jfif"] and passed == {".json": 1, "hidden": 1}
    member = 512 + -(-len(GOOD) // 512) * 512
    for damaged in (data[:member], data[: member + 200], data[: member - 700], data + data, gzip.compress(data)):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"t\.tar cannot be read to its end"):
            ids(file)


def test_mixed_folders_give_all_their_images(tmp_path):
    for name in ("data/en/0.parquet", "data/fr/0.parquet", "meta.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        column = "text" if name == "meta.parquet" else "image"
        pq.write_table(pa.table({column: [GOOD, GOOD]}), tmp_path / name)
    (tmp_path / "backup.tar").write_bytes(tar_of(["old.png"]))
    (tmp_path / "photo.png").write_bytes(GOOD)
    passed = Counter()
    tables = [f"data/{language}/0-0000000{row}" for language in ("en", "fr") for row in (0, 1)]
    assert ids(tmp_path, passed=passed) == ["backup/old.png", *tables, "photo.png"]
    assert passed == {"table without images": 1}


@pytest.mark.parametrize("column", ["image", "img", "images"])
def test_saved_data_sets(tmp_path, column):
    import datasets

    cell = [{"bytes": GOOD, "path": None}] * 2 if column == "images" else {"bytes": GOOD, "path": None}
    feature = datasets.List(datasets.Image()) if column == "images" else datasets.Image()
    rows = datasets.Dataset.from_dict({column: [cell]}, features=datasets.Features({column: feature}))
    rows.save_to_disk(tmp_path / "rows")
    found = list(read_source(str(tmp_path / "rows")))
    assert [item.id for item in found] == ["0", "0/2"][: len(found)] and found[-1].problem is None
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match="several splits; name the folder of one"):
        ids(tmp_path / "splits")


# lists

LISTS = {
    "list.txt": "b.webp\n\na/x.png\n",
    "bom.txt": "\ufeffb.webp\r\na/x.png\r\n",
    "list.jsonl": '{"image": "b.webp", "caption": "x"}\n{"images": ["a/x.png"]}\n',
    "several.jsonl": '{"images": ["b.webp", {"path": "a/x.png"}]}\n',
    "list.csv": f'image_path,label\nb.webp,"1, 2{"x" * 200_000}"\na/x.png,2\n',
    "excel.csv": "\ufeffimage;caption\r\nb.webp;x\r\na/x.png;y\r\n",
    "list.tsv": "n\timage\n1\tb.webp\n2\ta/x.png\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_names_images_below_its_folder(folder, name):
    (folder / name).write_text(LISTS[name], encoding="utf-8")
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
    named = ("../secret.png", str(folder.parent / "secret.png"), "https://a.example/b.png", "none.png", "nul\0.png",
             str(folder / "a.png"))  # fmt: skip
    rows = [*({"path": path} for path in named), {"video": "x"}, 3]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{oops\n")
    found = [item.problem.reason for item in unique(read_source(str(file)))]
    nowhere = [BadImage.UNREADABLE] * 2
    assert found == [BadImage.OUTSIDE] * 3 + nowhere + [BadImage.NOT_AN_IMAGE] + [BadImage.NO_PATH] * 3
    assert fingerprint(str(file))


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", b"x.png\ny.png\n", r"none of its columns \(x.png\) is one of image, image_path"),
        ("a.txt", b"\xff\xfe\x00", "is no list of paths in UTF-8"),
        ("a.md", b"x", r"neither a folder .* nor a list of paths \(.txt, .jsonl, .csv, .tsv\)"),
        ("/nowhere/none.csv", None, r"no .*none\.csv; name a folder, .* list of paths"),
    ],
)
def test_a_list_without_paths_is_refused(tmp_path, name, text, message):
    if text:
        (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError, match=message):
        ids(tmp_path / name)


def test_a_read_that_is_cut_short_is_tried_again(folder, monkeypatch):
    place, tries = image_sources._Place.of(str(folder)), []

    def short(self, path, start=None, end=None):
        tries.append(path)
        return b"x" * (2 if len(tries) == 1 else 4)

    monkeypatch.setattr(type(place.files), "cat_file", short)
    assert place.read("a.png", 0, 4) == b"xxxx" and len(tries) == 2
