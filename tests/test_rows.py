"""Rows survive a kill: each once, a torn last line dropped and counted."""

import errno
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from caprl_utils.errors import UserError
from caprl_utils.runs import RowStore


class Answer(BaseModel):
    id: str
    letter: str | None


def test_rows_come_back_in_order(tmp_path):
    with RowStore(tmp_path / "a.jsonl") as store:
        store.append({"id": "2", "v": None})
        store.append(Answer(id="1", letter="A"))
    again = RowStore(tmp_path / "a.jsonl")
    assert [row["id"] for row in again.read()] == ["2", "1"]
    assert again.done_ids() == {"1", "2"} and len(again) == 2 and "1" in again


def test_rows_as_models(tmp_path):
    store = RowStore(tmp_path / "a.jsonl")
    store.append({"id": "1", "letter": None})
    assert list(store.read(Answer)) == [Answer(id="1", letter=None)]


def test_an_id_is_taken_once(tmp_path):
    store = RowStore(tmp_path / "a.jsonl")
    store.append({"id": "1"})
    with pytest.raises(ValueError, match="'1' is in"):
        store.append({"id": "1"})
    with pytest.raises(ValueError, match="text `id`"):
        store.append({"id": 1})


@given(cut=st.integers(min_value=1, max_value=30))
def test_any_cut_of_the_last_line_is_repaired(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    lines = [json.dumps({"id": str(i), "text": "äöü" * 3}).encode() + b"\n" for i in range(3)]
    path.write_bytes(b"".join(lines)[:-cut])
    store = RowStore(path)
    assert store.torn == 1 and store.done_ids() == {"0", "1"}
    store.append({"id": "2"})
    assert [row["id"] for row in RowStore(path).read()] == ["0", "1", "2"]


def test_damage_in_the_middle_names_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "1"}\nnonsense\n{"id": "2"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 is no row"):
        RowStore(tmp_path / "a.jsonl")


def test_full_disk_leaves_no_half_row(tmp_path):
    store = RowStore(tmp_path / "a.jsonl")
    store.append({"id": "1"})
    store._file = _FullAfter(store._file, 5)
    with pytest.raises(UserError, match=r"the disk is full: .*a\.jsonl.* MB free"):
        store.append({"id": "2"})
    again = RowStore(tmp_path / "a.jsonl")
    assert again.torn == 0 and again.done_ids() == {"1"}


class _FullAfter:
    """A file that takes a few more bytes and then reports a full disk."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def fileno(self):
        return self._file.fileno()

    def write(self, data):
        if not self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        count, self._room = self._file.write(data[: self._room]), 0
        return count


def test_reading_a_store_that_does_not_exist(tmp_path):
    assert list(RowStore(tmp_path / "none.jsonl").read()) == []
