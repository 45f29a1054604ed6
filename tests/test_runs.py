"""Run folders: complete means this very key, stale rows never mix, one process at a time, no half files; rows survive
a kill, each once.
"""

import errno
import json
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from caprl_utils import files, paths, runs
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic
from caprl_utils.runs import Lock, RowStore, Run, load_result

RECIPE = ["caprl_utils.answers"]


def open_run(**parts):
    return Run.open(load_profile("smoke"), "stage", "name", parts, RECIPE)


def finish(run, accuracy=0.5):
    return run.finish(values={"accuracy": accuracy, "missing": None}, n=4, unit="image", unparsed=1)


def ids(store):
    return [row["id"] for row in store.read()]


def test_a_run_is_complete_only_after_finish_and_its_record_answers_without_other_files(runs_folder, monkeypatch):
    report, log = paths.reports_of("smoke") / "table3.md", runs_folder / "access"
    assert not report.is_relative_to(paths.REPORTS)
    with open_run(a=1) as run, pytest.raises(ValueError, match="Out of range float"):
        finish(run, float("nan"))
    monkeypatch.setenv(files.ACCESS_LOG_ENV, str(log))
    with open_run(a=1) as run:
        assert not run.complete and run.folder == runs_folder / "smoke" / "stage" / "name"
        assert {file.name for file in run.folder.iterdir()} == {"config.json", "key.json"}
        record = finish(run)
    write_atomic(report, "| |")
    write_atomic(runs_folder / "other.txt", "x")
    assert log.read_text().splitlines() == [str(run.folder / "result.json"), str(report)]
    with open_run(a=1) as again:
        assert again.complete and again.result["values"] == {"accuracy": 0.5, "missing": None}
    assert record == load_result(run.folder)
    assert record.keys() >= {"profile", "stage", "name", "n", "unit", "unparsed", "seeds", "commit", "dirty"}
    assert json.loads((run.folder / "config.json").read_text())["name"] == "smoke"
    assert json.loads((run.folder / "key.json").read_text())["key"] == record["key"]
    assert set(record["hashes"]) == {"config", "a", "versions"} and set(record["code"]) == set(RECIPE)
    assert record["versions"]["python"] and record["hardware"]["cores"] and record["wall_sec"] >= 0


def test_rows_resume_after_a_stop_and_another_key_sets_them_aside_and_says_why(caplog, monkeypatch):
    for number in ("1", "2"):
        with open_run(a=1, b=1) as run:
            run.rows("answers").append({"id": number})
    with open_run(a=1, b=1) as run:
        finish(run)
    assert ids(run.rows("answers")) == ["1", "2"]
    with open_run(a=2, b=1) as run:
        assert not run.complete and not len(run.rows("answers"))
    assert "changed: a)" in caplog.text and ".stale/name" in caplog.text
    assert (run.folder.parent / ".stale" / "name" / "answers.jsonl").is_file()
    monkeypatch.setattr(runs, "code_hashes", lambda recipe: {"caprl_utils.answers": "other"})
    with open_run(a=2, b=1) as run:
        assert not run.complete and "changed: code of caprl_utils.answers)" in caplog.text
    assert (run.folder.parent / ".stale" / "name" / "result.json").is_file()  # two changes in turn do not cost it


def test_a_bad_name_and_a_missing_or_damaged_result_are_told(tmp_path):
    with pytest.raises(ValueError, match="plain folder names"):
        Run.open(load_profile("smoke"), "..", "name", {}, RECIPE)
    with pytest.raises(UserError, match=r"no result at .*run it first"):
        load_result(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        load_result(tmp_path)


HOLD = """import sys, time, pathlib; from caprl_utils.runs import Lock
Lock(pathlib.Path(sys.argv[1]), "the folder").acquire(); print("held", flush=True); time.sleep(60)"""


def test_a_second_process_waits_and_names_the_first_whose_death_frees_the_lock(tmp_path, capsys):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    holder = subprocess.Popen(command, cwd=paths.ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    threading.Timer(0.5, holder.kill).start()
    with Lock(tmp_path / "lock", "the folder"):
        assert f"waiting: the folder is in use by process {holder.pid}" in capsys.readouterr().err
        assert holder.wait() < 0
        Lock(tmp_path / "lock", "x").acquire()  # the same process may


def full(_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_atomic_write_keeps_the_old_file_on_a_full_disk(tmp_path, monkeypatch):
    target = tmp_path / "result.json"
    write_atomic(target, "old")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"the disk is full: .*result\.json"):
        write_atomic(target, "new")
    assert target.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["result.json"]
    with pytest.raises(OSError, match=r"Not a directory|File exists"):  # other errors are not hidden
        write_atomic(target / "below", "x")


class Answer(BaseModel):
    id: str
    letter: str | None


def test_rows_come_back_in_order_and_an_id_is_taken_once(tmp_path):
    with RowStore(tmp_path / "a.jsonl") as store:
        assert list(store.read()) == []
        store.append({"id": "2", "letter": None})
        store.append(Answer(id="1", letter="A"))
    again = RowStore(tmp_path / "a.jsonl")
    assert list(again.read(Answer)) == [Answer(id="2", letter=None), again.get("1", Answer)]
    assert len(again) == 2 and "1" in again and "3" not in again
    for taken in ("1", 1):
        with pytest.raises(ValueError, match=f"text `id` of their own, got {taken!r}"):
            again.append({"id": taken})


@settings(max_examples=30)
@given(cut=st.integers(min_value=1, max_value=30))
def test_any_cut_of_the_last_line_is_repaired_and_damage_in_the_middle_named(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    lines = [json.dumps({"id": str(i), "text": "äöü" * 3}).encode() + b"\n" for i in range(3)]
    path.write_bytes(b"".join(lines)[:-cut])
    store = RowStore(path)
    assert len(store) == 2 and "1" in store
    store.append({"id": "2"})
    assert ids(RowStore(path)) == ["0", "1", "2"]
    path.write_bytes(lines[0] + lines[1][: -1 - cut] + b"\n" + lines[2])
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 is no row"):
        RowStore(path)


def test_full_disk_leaves_no_half_row(tmp_path):
    store = RowStore(tmp_path / "a.jsonl")
    store.append({"id": "1"})
    file, room = store._file, [5]
    store._file = SimpleNamespace(
        fileno=file.fileno, write=lambda data: file.write(data[: room.pop()]) if room else full(data)
    )
    with pytest.raises(UserError, match=r"the disk is full: .*a\.jsonl.* MB free"):
        store.append({"id": "2"})
    assert ids(RowStore(tmp_path / "a.jsonl")) == ["1"]
