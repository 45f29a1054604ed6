"""One way to open an image, and every source of images: what is refused, in which order, and what stays closed."""

import gzip
import io
import json
import os
import tarfile
import tracemalloc
from collections import Counter

import datasets
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
    image.save(buffer := io.BytesIO(), format=kind, **options)
    return buffer.getvalue()


def two(kind: str) -> bytes:
    return as_bytes(picture(0), kind, save_all=True, append_images=[picture(1)])


GOOD = as_bytes(picture(0))
BAD = {
    "empty.png": (b"", BadImage.EMPTY),
    "text.png": (b"this is no image at all", BadImage.NOT_AN_IMAGE),
    "truncated.png": (GOOD[: len(GOOD) // 2], BadImage.TRUNCATED),
    "truncated.jpg": (as_bytes(picture(1), "JPEG")[:600], BadImage.TRUNCATED),
    "huge.ppm": (b"P6 12001 12001 255\n", BadImage.TOO_LARGE),
    "narrow.png": (as_bytes(Image.new("RGB", (1000, 4))), BadImage.TOO_NARROW),
    "moving.gif": (two("GIF"), BadImage.ANIMATED),
    "drawing.svg": (b"<svg/>", BadImage.NOT_AN_IMAGE),
}
USUAL = {  # what viewers show and a captioner is to see, whatever its name says
    "cmyk.jpg": as_bytes(picture(0).convert("CMYK"), "JPEG"),
    "webp.jpg": as_bytes(picture(0), "WEBP", lossless=True),
    "phone.jpg": two("MPO"),
    "pages.tif": two("TIFF"),
    **{f"a.{kind[:4]}": as_bytes(picture(0), kind) for kind in ("AVIF", "JPEG2000", "GIF", "PPM", "TGA")},
    "Screenshot at 10.15.33": GOOD,
}


def test_a_bad_image_is_set_aside_with_its_reason_and_a_usual_one_is_opened_by_its_content():
    for name, (data, reason) in BAD.items():
        item = ImageItem(name, lambda data=data: data, path=name)
        assert (item.problem.reason, item.image) == (reason, None), name
    for name, data in USUAL.items():
        shown = ImageItem(name, lambda data=data: data, path=name).open()
        assert shown.mode == "RGB" and shown.size == (128, 96), name
        assert np.abs(np.asarray(shown, int) - np.asarray(picture(0), int)).mean() < 12, name


BROKEN_EXIF = (  # orientation 6, and a rational of -1/0
    b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\x1a\x01\n\0\x01\0\0\0\x26\0\0\0\0\0\0\0"
    b"\xff\xff\xff\xff\0\0\0\0"
)


@pytest.mark.parametrize("kind", range(1, 9))
def test_pictures_stand_upright_once(kind):
    exif = Image.Exif()
    exif[0x0112] = kind
    data = as_bytes(picture(0), "JPEG", exif=exif)
    wanted = (96, 128) if kind > 4 else (128, 96)
    shown = open_image(data)
    assert shown.size == as_rgb(shown).size == wanted and as_rgb(Image.open(io.BytesIO(data))).size == wanted
    assert open_image(data, max_pixels=3072).size == tuple(side // 2 for side in wanted)
    assert open_image(encode(shown)[0]).size == wanted and (kind == 1) == (encode(shown)[1] == "image/jpeg")
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
    shown = open_image(as_bytes(image.convert(mode) if mode != "P" else image.quantize(8)))
    grey = np.asarray(shown.convert("L"))
    assert grey[-1].min() == 255 and grey.min() < 60
    assert np.array_equal(np.asarray(open_image(encode(shown)[0]).convert("L")), grey)


def test_large_pictures_are_scaled_once_and_plain_files_are_sent_as_they_are():
    data = as_bytes(picture(0, (1600, 1200)), "JPEG")
    whole, small = open_image(data), open_image(data, max_pixels=160_000)
    assert encode(whole) == (data, "image/jpeg") and fit(whole, 160_000).size == (461, 346)
    assert small.size == (461, 346) and encode(small)[1] == "image/png" and fit(small, 160_000) is small
    assert encode(whole.resize((40, 30)))[1] == "image/png"


# folders

NAMES = ["a/x.png", "a/z/1.PNG", "a-b/y.jpg", "a.png", "b.webp"]


@pytest.fixture
def folder(tmp_path):
    return files(tmp_path / "images", *NAMES, "notes.md", ".hidden", ".git/x.png")


def files(root, *names, data=None):
    """A folder with these files; each holds its own name, or `data`."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data or name.encode())
    return root


def ids(source, kinds=None, passed=None):
    return [image.id for image in read_source(str(source), kinds, passed)]


def problems(source):
    return {item.id: item.problem and item.problem.reason for item in read_source(str(source))}


def test_a_folder_is_walked_in_the_order_of_sorted_paths_and_what_is_passed_over_is_counted(folder, monkeypatch):
    (folder / "a" / "loop").symlink_to(folder)
    files(folder, "hash", data=GOOD)
    (folder / "LICENSE").touch()
    os.mkfifo(folder / "pipe.png")
    passed = Counter()
    assert ids(folder, passed=passed) == [*NAMES, "hash"]
    assert passed == {".md": 1, "hidden": 2, "link to a folder above it": 1, "without suffix": 1, "no file": 1}
    assert ids(folder, ["a"]) == ["a/x.png", "a/z/1.PNG"]
    with pytest.raises(UserError, match=r"no image in .*; passed over: 1 .md"):
        ids(files(folder / "only", "x.md"))
    monkeypatch.setattr("caprl_utils.paths.HOME", folder.parent)  # else from the working folder
    monkeypatch.chdir(folder / "a")
    assert ids("images")[:5] == NAMES and ids("../a/z") == ["1.PNG"]


def test_links_are_followed_and_what_has_no_picture_or_no_name_is_set_aside(folder, tmp_path):
    """As the snapshots of Hugging Face's cache link into its blobs."""
    blobs = files(tmp_path / "blobs", "abc", data=GOOD)
    for name, target in (("linked", blobs), ("link.png", blobs / "abc"), ("dangling.png", "no"), ("me.png", "me.png")):
        (folder / name).symlink_to(target)
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:
        file.write(GOOD)
    found = problems(folder)
    assert found["linked/abc"] is found["link.png"] is None and len(found) == len(NAMES) + 5
    assert found["me.png"] == found["dangling.png"] == BadImage.UNREADABLE and found["caf\\udce9.png"] == BadImage.NAME
    assert ids(files(tmp_path / "a::b", "x.png", data=GOOD)) == ["x.png"]  # no chain of stores


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_closed_folder_is_passed_over_and_told(folder):
    (folder / "a").chmod(0)
    passed = Counter()
    assert ids(folder, passed=passed) == NAMES[2:] and f"closed folder {folder / 'a'}" in passed
    (folder / "a").chmod(0o755)


def test_the_hash_of_a_folder_changes_with_its_images_and_with_nothing_else(folder, tmp_path):
    before = fingerprint(str(folder))
    files(folder, "notes.md", ".DS_Store", data=b"more")
    os.utime(folder / "a.png")
    moved = folder.rename(tmp_path / "moved")
    assert fingerprint(str(moved)) == before
    changed = fingerprint(str(files(moved, "a/new.png")))
    (moved / "a" / "new.png").rename(moved / "a" / "newer.png")
    assert len({before, changed, fingerprint(str(moved)), fingerprint("a/data"), fingerprint("a/other")}) == 5


def test_only_the_names_of_one_folder_are_held(tmp_path):
    """20 folders of 50 files: the peak is that of one folder, far below that of 1,000 names."""
    files(tmp_path, *(f"{number // 50:03d}/{number % 50:03d}.png" for number in range(1000)))
    fingerprint(str(tmp_path))
    tracemalloc.start()
    fingerprint(str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30_000


# tables and tars


def table(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def test_parquet_rows_and_their_kinds(tmp_path):
    rows = [
        {"id": "a", "image": {"bytes": GOOD, "path": "a.png?width=5"}, "kind": "chart"},
        {"id": "b", "image": {"bytes": None, "path": "../outside.png"}, "kind": "chart"},
        {"id": "c", "image": None, "kind": "scene"},
        {"id": "a", "image": {"bytes": GOOD, "path": None}, "kind": "scene"},
    ]
    files(tmp_path, "outside.png", data=GOOD)
    settings = {"images.source": str(table(tmp_path / "data" / "set.parquet", rows))}
    found = {i.id: i.problem and i.problem.reason for i in open_images(load_profile("smoke", settings))}
    assert found == {"a": None, "b": BadImage.OUTSIDE, "c": BadImage.EMPTY, "a (set.parquet#3)": BadImage.SAME_ID}
    charts = load_profile("smoke", settings | {"images.kinds": ["chart"], "images.num_images": 1})
    assert [item.id for item in open_images(charts)] == ["a"]


CELLS = {
    "bytes": GOOD, "path": "x.png", "struct": {"bytes": GOOD, "path": None}, "struct of a path": {"path": "x.png"},
    "bytes only": {"bytes": GOOD}, "list": [{"bytes": GOOD, "path": None}] * 2, "paths": ["x.png", "x.png"],
}  # fmt: skip


@pytest.mark.parametrize("column", ["image", "images", "img"])
def test_every_form_of_a_cell_is_read(tmp_path, column):
    files(tmp_path, "x.png", data=GOOD)
    for kind, cell in CELLS.items():
        found = problems(table(tmp_path / "t.parquet", [{"text": "t", column: cell}] * 2))
        assert len(found) == (4 if isinstance(cell, list) else 2) and set(found.values()) == {None}, kind


def test_a_damaged_or_other_table_is_named(tmp_path):
    file = table(tmp_path / "t.parquet", [{"text": "x", "image": 3}])
    with pytest.raises(UserError, match=r"t\.parquet has no column `image`; its columns: text, image"):
        ids(file)
    data = table(file, [{"image": GOOD}] * 9).read_bytes()
    file.write_bytes(data[:200] + b"\0" * 300 + data[500:])
    assert set(problems(file).values()) <= {None, BadImage.UNREADABLE, BadImage.TRUNCATED}
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"t\.parquet is no parquet file that can be read"):
        ids(file)


def tar_of(*members) -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as archive:
        for name in members:
            info = tarfile.TarInfo(name)
            info.size = len(GOOD)
            archive.addfile(info, io.BytesIO(GOOD))
    return buffer.getvalue()


def test_tars_are_read_to_their_end_or_named(tmp_path):
    file, data, passed = tmp_path / "t.tar", tar_of("0.png", "0.json", "._0.png", "1.jfif"), Counter()
    file.write_bytes(data)
    assert ids(file, passed=passed) == ["t/0.png", "t/1.jfif"] and passed == {".json": 1, "hidden": 1}
    member = 512 + -(-len(GOOD) // 512) * 512
    for damaged in (data[:member], data[: member + 200], data[: member - 700], data + data, gzip.compress(data)):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"t\.tar cannot be read to its end"):
            ids(file)


def test_mixed_folders_give_all_their_images(tmp_path):
    for name in ("data/en/0", "data/fr/0", "meta"):
        table(tmp_path / f"{name}.parquet", [{"text" if name == "meta" else "image": GOOD}] * 2)
    files(tmp_path, "backup.tar", data=tar_of("old.png"))
    files(tmp_path, "photo.png", data=GOOD)
    table(tmp_path / "metadata.parquet", [{"image": "photo.png"}])  # of a picture that stands there anyway
    passed = Counter()
    tables = [f"data/{language}/0-0000000{row}" for language in ("en", "fr") for row in (0, 1)]
    assert ids(tmp_path, passed=passed) == ["backup/old.png", *tables, "photo.png"]
    assert passed == {"table without images": 2}


@pytest.mark.parametrize("column", ["img", "images"])
def test_saved_data_sets(tmp_path, column):
    cell, feature, wanted = {"bytes": GOOD, "path": None}, datasets.Image(), ["0"]
    if column == "images":
        cell, feature, wanted = [cell] * 2, datasets.List(feature), ["0", "0/2"]
    rows = datasets.Dataset.from_dict({column: [cell]}, features=datasets.Features({column: feature}))
    rows.save_to_disk(tmp_path / "rows")
    assert problems(tmp_path / "rows") == dict.fromkeys(wanted)
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
    assert ids(folder / name) == ["b.webp", "a/x.png"] and ids(folder / name, ["a"]) == ["a/x.png"]
    before = fingerprint(str(folder / name))
    files(folder, "a.png", data=b"another")  # not in the list
    assert fingerprint(str(folder / name)) == before
    files(folder, "b.webp", data=b"another one")
    assert fingerprint(str(folder / name)) != before


def test_what_a_list_names_outside_or_nowhere_has_its_problem(folder):
    file = folder / "list.jsonl"
    (folder.parent / "secret.png").write_bytes(b"x")
    outside = ("../secret.png", str(folder.parent / "secret.png"), "https://a.example/b.png")
    rows = [{"path": path} for path in (*outside, "none.png", "nul\0.png", str(folder / "a.png"))] + [{"video": "x"}, 3]
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
    place, reads = image_sources._Place.of(str(folder)), iter([b"xx", b"xxxx"])
    monkeypatch.setattr(type(place.files), "cat_file", lambda *_, **__: next(reads))
    assert place.read("a.png", 0, 4) == b"xxxx"
