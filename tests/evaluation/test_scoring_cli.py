"""`python -m caprl_utils.evaluation.scoring --vectors FILE`."""

import json
import subprocess
import sys
from pathlib import Path

from caprl_utils import paths
from caprl_utils.evaluation.scoring.__main__ import main

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


def test_unusable_files_are_named(tmp_path, capsys):
    assert main(["--vectors", str(tmp_path / "none.jsonl")]) == 2
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"benchmark": "gqa"}\n', encoding="utf-8")
    assert main(["--vectors", str(broken)]) == 2
    assert main(["--vectors", write(tmp_path / "mode.jsonl", vector(mode="other"))]) == 2
    assert main(["--vectors", write(tmp_path / "key.jsonl", vector(benchmark="gqqa"))]) == 2
    err = capsys.readouterr().err
    assert "none.jsonl" in err and "broken.jsonl, line 1" in err and "'other'" in err and "gqa" in err


def test_it_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "caprl_utils.evaluation.scoring", "--vectors"]
    done = subprocess.run(
        [*command, write(tmp_path / "v.jsonl", vector())], cwd=paths.ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "1 passed, 0 failed"), done.stderr
