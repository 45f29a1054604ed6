"""Files of lmms-eval and VLMEvalKit: written, read back as those packages do, and imported again."""

import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.prism import exchange
from caprl_utils.prism.exchange import export_lmms_eval, export_vlmevalkit, read_answers
from caprl_utils.prism.imported import Foreign, evaluate_answers
from caprl_utils.prism.loaders import Sample
from caprl_utils.prism.prism_scores import read_samples

IMAGE = Image.new("RGB", (4, 4))
ANSWERS = ["B", "None", 'a\tb "c"\nd', "", "café", "A) red"]


def make_samples(golds=("B", "none", 'a\tb "c"\nd', "x", ["café", "coffee"], "A"), benchmark="mini-document"):
    return [
        Sample(
            id=f"s-{n}", benchmark=benchmark, images=(lambda: IMAGE,), question=f"What is {n}, \"quoted\"?",
            gold=gold, options=("red", "blue") if gold in ("A", "B") else (), meta={"image_id": f"i{n}"},
        )
        for n, gold in enumerate(golds)
    ]  # fmt: skip


@pytest.fixture
def profile(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    return load_profile("smoke")


def finished(profile, answers, name="ours", samples=None):
    samples = samples or make_samples()
    given = [Foreign(tuple(a) if isinstance(a, list) else (a,), place=n) for n, a in enumerate(answers)]
    return evaluate_answers(profile, name, given, samples, source="test"), paths.RUNS / "smoke" / "vqa" / name


def test_lmms_eval_and_back(profile, tmp_path):
    record, run = finished(profile, ANSWERS)
    summary, file = export_lmms_eval(run, tmp_path / "logs")
    assert file.name.split("_samples_")[1] == "mini-document.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line["filtered_resps"] for line in lines] == ANSWERS and lines[2]["doc_id"] == 2
    assert lines[1]["score"] == 1.0 and lines[4]["target"] == '["caf\\u00e9", "coffee"]'
    mean = record["values"]["average"]
    assert json.loads(summary.read_text())["results"]["mini-document"]["score,none"] == mean
    again = evaluate_answers(profile, "again", read_answers(file), make_samples(), source=file.name)
    assert again["values"] == record["values"] and again["imported_from"] == file.name


def test_lmms_evals_own_reader_reads_it(profile, tmp_path):
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.skip("lmms-eval is not installed")
    from lmms_eval.baselines.loader import load_baseline

    _, run = finished(profile, ANSWERS)
    summary, file = export_lmms_eval(run, tmp_path)
    scores, results = load_baseline(str(file), "mini-document")
    assert scores == {n: row["score"] for n, row in enumerate(read_samples(run))}
    assert results == json.loads(summary.read_text())


def test_lines_of_older_lmms_eval_versions(tmp_path):
    file = tmp_path / "x_samples_gqa.jsonl"
    file.write_text(
        '{"doc_id": 0, "target": "a", "filtered_resps": ["yes"]}\n\n'
        '{"doc_id": 1, "target": "a", "filtered_resps": [["no"]], "resps": [["no"]]}\n'
    )
    assert [found.answers for found in read_answers(file)] == [("yes",), ("no",)]


def test_several_captions_are_kept_together(profile, tmp_path):
    record, run = finished(profile, [["B", "A"], *[[text, text] for text in ANSWERS[1:]]])
    _, file = export_lmms_eval(run, tmp_path)
    first = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    assert first["filtered_resps"] == ["B", "A"] and 0 < first["score"] < 1
    again = evaluate_answers(profile, "again", read_answers(file), make_samples(), source="x")
    assert again["values"] == record["values"]
    files = export_vlmevalkit(run, tmp_path)
    assert [f.name for f in files] == ["ours_mini-document.tsv", "ours-caption2_mini-document.tsv"]


@pytest.mark.parametrize("suffix", ["tsv", "xlsx"])
def test_vlmevalkit_and_back(profile, tmp_path, suffix):
    record, run = finished(profile, ANSWERS)
    (file,) = export_vlmevalkit(run, tmp_path, suffix)
    # VLMEvalKit's own `load`: pd.read_csv(f, sep="\t") or pd.read_excel(f)
    data = pd.read_csv(file, sep="\t") if suffix == "tsv" else pd.read_excel(file)
    assert list(data.columns) == ["index", "question", "A", "B", "answer", "prediction"]
    assert data["prediction"][0] == "B" and data["A"][0] == "red" and data["prediction"][2] == ANSWERS[2]
    again = evaluate_answers(profile, "again", read_answers(file), make_samples(), source=file.name)
    assert again["values"] == record["values"]


def test_foreign_rows_are_matched_by_question_where_ids_differ(profile, tmp_path):
    samples = make_samples(("1", "2"))
    file = tmp_path / "m_ChartQA.tsv"
    frame = pd.DataFrame(
        {"index": [7, 8], "question": [s.question for s in samples], "prediction": ["1", "x"]}
    )
    frame.to_csv(file, sep="\t", index=False)
    record = evaluate_answers(profile, "other", read_answers(file), samples, source="x")
    assert [row["score"] for row in read_samples(paths.RUNS / "smoke" / "vqa" / "other")] == [1.0, 0.0]
    assert record["n"] == {"mini-document": 2}


def test_mistakes_are_named(profile, tmp_path):
    samples = make_samples(("1", "2"))
    with pytest.raises(UserError, match="1 answers for 2 questions"):
        evaluate_answers(profile, "x", [Foreign(("1",), place=0)], samples, source="x")
    swapped = [Foreign(("1",), place=n, gold=gold, row=f"line {n + 1}") for n, gold in enumerate("21")]
    with pytest.raises(UserError, match="line 1: its answer is '2', that of mini-document s-0 is '1'"):
        evaluate_answers(profile, "x", swapped, samples, source="x")
    strange = [Foreign(("1",), sample_id=f"q{n}", question="Who?", row=f"row {n}") for n in range(2)]
    with pytest.raises(UserError, match="row 0: index 'q0', question 'Who"):
        evaluate_answers(profile, "x", strange, samples, source="x")
    (tmp_path / "a.jsonl").write_text('{"doc_id": 1}\n')
    (tmp_path / "a.tsv").write_text("index\tquestion\n1\ta\n")
    for file, text in (("a.jsonl", "line 1"), ("a.tsv", "no column prediction"), ("none.tsv", "no file")):
        with pytest.raises(UserError, match=text):
            read_answers(tmp_path / file)
    with pytest.raises(UserError, match=r"end in \.jsonl"):
        read_answers(Path(__file__))


def test_command_line(profile, tmp_path, monkeypatch, capsys):
    _, run = finished(profile, ANSWERS)
    assert exchange.main(["export", str(run), "--to", "lmms-eval", "--out", str(tmp_path / "out")]) == 0
    file = capsys.readouterr().out.splitlines()[1]
    monkeypatch.setattr(exchange, "load_samples", lambda profile, names, count: make_samples())
    arguments = ["import", file, "--benchmark", "mini-document", "--name", "back"]
    assert exchange.main(arguments) == 0
    assert capsys.readouterr().out.startswith("mini-document ")
    assert exchange.main(["export", str(tmp_path), "--to", "vlmevalkit", "--out", str(tmp_path)]) == 1
    assert "no result at" in capsys.readouterr().err
