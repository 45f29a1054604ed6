"""`python -m caprl_utils.prism.scoring --vectors FILE`."""

import json
import subprocess
import sys
from pathlib import Path

from caprl_utils import paths
from caprl_utils.prism.scoring.__main__ import main

VECTORS = Path(__file__).parents[1] / "data" / "scoring-vectors.jsonl"


def test_all_vectors_pass(capsys):
    assert main(["--vectors", str(VECTORS)]) == 0
    count = len(VECTORS.read_text(encoding="utf-8").splitlines())
    assert capsys.readouterr().out.strip() == f"{count} passed, 0 failed"


def write(path, *vectors):
    path.write_text("".join(json.dumps(vector) + "\n" for vector in vectors), encoding="utf-8")
    return str(path)


def vector(**changes):
    return {
        "benchmark": "gqa",
        "prediction": "yes",
        "gold": "yes",
        "mode": "standard",
        "expected": 1.0,
        **changes,
    }


def test_failures_are_printed_and_counted(tmp_path, capsys):
    file = write(
        tmp_path / "v.jsonl", vector(), vector(expected=0.0), vector(benchmark="mmvet", expected=None)
    )
    assert main(["--vectors", file]) == 1
    out = capsys.readouterr().out
    assert "FAILED line 2: gqa" in out
    assert out.strip().endswith("2 passed, 1 failed")


def test_the_value_for_the_pinned_version_wins(tmp_path, capsys):
    meta = {"math_verify": {"0.9.0": 0.0, "0.8.0": 1.0}}
    assert main(["--vectors", write(tmp_path / "v.jsonl", vector(expected=0.0, meta=meta))]) == 0
    assert "1 passed, 0 failed" in capsys.readouterr().out


def test_a_line_that_is_no_vector_fails_alone(tmp_path, capsys):
    file = tmp_path / "v.jsonl"
    bad = [
        "{broken", '["a list"]', json.dumps({"benchmark": "gqa", "mode": "standard"}), json.dumps(vector(mode="other")),
        json.dumps(vector(benchmark="gqqa")), json.dumps(vector(expected="yes")), json.dumps(vector(meta=[1])),
        json.dumps(vector(prediction=7)), json.dumps(vector(mode="caprl")),
    ]  # fmt: skip
    file.write_text("\n".join([*bad, json.dumps(vector()), ""]), encoding="utf-8")
    assert main(["--vectors", str(file)]) == 1
    out = capsys.readouterr().out
    assert out.endswith("1 passed, 9 failed\n")
    for text in (
        "line 2 of", "not list", "missing prediction, gold, expected", "mode is 'other'", "'gqqa': did you mean",
        "expected is 'yes'", "meta is list", "must be text, not int", "use mode 'standard'",
    ):  # fmt: skip
        assert text in out, text


def test_unusable_files_are_named(tmp_path, capsys):
    assert main(["--vectors", str(tmp_path / "none.jsonl")]) == 2
    assert main(["--vectors", write(tmp_path / "empty.jsonl")]) == 2
    err = capsys.readouterr().err
    assert "none.jsonl" in err and "empty.jsonl is empty" in err


def test_it_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "caprl_utils.prism.scoring", "--vectors"]
    done = subprocess.run(
        [*command, write(tmp_path / "v.jsonl", vector())], cwd=paths.ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "1 passed, 0 failed"), done.stderr
