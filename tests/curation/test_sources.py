"""Folders are walked in one order without holding all names; lists of paths; what changes a source's hash."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from caprl_utils.curation import sources
from caprl_utils.errors import UserError

NAMES = ("a/x.png", "a/z/1.PNG", "a-b/y.jpg", "a.png", "b.webp")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for name in (*NAMES, "notes.md", ".hidden"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def ids(source, kinds=None):
    return [image.id for image in sources.read_source(str(source), kinds)]


def test_a_folder_is_walked_in_the_order_of_sorted_paths(folder):
    (folder / "loop").symlink_to(folder)
    (folder / "link.png").symlink_to(folder / "a")
    found = list(sources.walk(folder))
    assert found == [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*"))
                     if not p.is_dir() or p.is_symlink()]  # fmt: skip
    assert ids(folder) == list(NAMES)
    assert ids(folder, ["a"]) == ["a/x.png", "a/z/1.PNG"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_closed_folder_is_named(folder):
    (folder / "a").chmod(0)
    with pytest.raises(UserError, match=r"images/a cannot be read: permission denied"):
        list(sources.walk(folder))
    (folder / "a").chmod(0o755)


def test_the_hash_of_a_folder_changes_with_its_files_and_not_with_its_place(folder, tmp_path):
    before = sources.fingerprint(str(folder))
    (folder / "nowhere.png").symlink_to(folder / "none")
    assert sources.fingerprint(str(folder)) == before
    moved = folder.rename(tmp_path / "moved")
    assert sources.fingerprint(str(moved)) == before
    (moved / "a" / "new.png").write_bytes(b"x")
    changed = sources.fingerprint(str(moved))
    (moved / "a" / "new.png").rename(moved / "a" / "newer.png")
    assert len({before, changed, sources.fingerprint(str(moved))}) == 3
    assert sources.fingerprint("someone/data") != sources.fingerprint("someone/other")


def test_only_the_names_of_one_folder_are_held(tmp_path, monkeypatch):
    """100 folders of 100 files: the peak is that of one folder, far below that of 10,000 names."""
    for number in range(100):
        (tmp_path / f"{number:03d}").mkdir()
        for name in range(100):
            (tmp_path / f"{number:03d}" / f"{name:03d}.png").touch()
    sources.fingerprint(str(tmp_path))
    tracemalloc.start()
    try:
        sources.fingerprint(str(tmp_path))
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
    before = sources.fingerprint(str(folder / name))
    (folder / "a.png").write_bytes(b"another")  # not in the list
    assert sources.fingerprint(str(folder / name)) == before
    (folder / "b.webp").write_bytes(b"another one")
    assert sources.fingerprint(str(folder / name)) != before


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
    outside, nowhere = sources.OUTSIDE, sources.UNREADABLE
    found = [image.problem for image in sources.read_source(str(file))]
    assert found == [outside, outside, nowhere, nowhere, None]
    assert sources.fingerprint(str(file))


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
