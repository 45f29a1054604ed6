"""Answers and scores in the files of other toolkits, both ways.

    python -m caprl_utils.prism.exchange export RUN --to lmms-eval --out FOLDER
    python -m caprl_utils.prism.exchange export RUN --to vlmevalkit --out FOLDER
    python -m caprl_utils.prism.exchange import FILE --benchmark chartqa --profile mini --name other

RUN is a finished run's folder (prism or vqa). An import scores another toolkit's answers by our scorer and
statistics, as a run under runs/<profile>/vqa.

* lmms-eval 0.7: <date>_samples_<task>.jsonl beside <date>_results.json, one folder a model. `doc_id` is the place
  among the benchmark's questions in the run; `score` is our score.
* VLMEvalKit: <model>_<dataset>.tsv (what it writes with PRED_FORMAT=tsv) or .xlsx, with index, question, options by
  letter, answer, prediction. It holds one answer a question: several captions make one file each.

An answer that the reader did not give is an empty text in both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError, command_line
from caprl_utils.files import write_atomic, write_json
from caprl_utils.hashing import text_hash
from caprl_utils.notebook import prepare_process
from caprl_utils.prism import imported
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.prism.prism import load_samples
from caprl_utils.prism.prism_scores import read_samples
from caprl_utils.runs import load_result

if TYPE_CHECKING:
    import pandas as pd

Rows = Sequence[Mapping[str, Any]]


def export_lmms_eval(run: Path, out: Path) -> list[Path]:
    """Write a run as lmms-eval logs it; returns the files, the summary first.

    Raises UserError when the run is not finished, or holds rotated questions.
    """
    record, questions = load_result(run), _questions(run)
    folder = out / _plain_name(record["label"])
    date = record["finished"].split("+")[0].replace(":", "-")  # no underscore: it ends the date there
    files = []
    for benchmark, found in questions.items():
        lines = [
            json.dumps(_lmms_line(place, rows), ensure_ascii=False)
            for place, rows in enumerate(found.values())
        ]
        file = folder / f"{date}_samples_{benchmark}.jsonl"
        write_atomic(file, "\n".join(lines) + "\n")
        files.append(file)
    values = record["values"]["benchmarks"]
    summary = {
        "results": {name: {"alias": name, "score,none": values[name]["mean"]} for name in questions},
        "n-samples": {
            name: {"original": len(found), "effective": len(found)} for name, found in questions.items()
        },
        "config": {"model": record["label"], "run_key": record["key"], "seeds": record["seeds"]},
        "model_name": record["label"],
        "date": date,
    }
    write_json(folder / f"{date}_results.json", summary)
    return [folder / f"{date}_results.json", *files]


def _lmms_line(place: int, rows: Rows) -> dict[str, Any]:
    first, answers = rows[0], [row["answer"] or "" for row in rows]
    return {
        "doc_id": place,
        "target": first["gold"],
        "filtered_resps": answers[0] if len(answers) == 1 else answers,
        "doc_hash": text_hash(json.dumps([first["benchmark"], first["sample_id"], first["question"]])),
        "score": _mean([row["score"] for row in rows]),
        "input": first["question"],
        "sample_id": first["sample_id"],
        "captions": [row["caption"] for row in rows],
    }


def export_vlmevalkit(run: Path, out: Path, suffix: str = "tsv") -> list[Path]:
    """Write a run as VLMEvalKit's prediction files, one per benchmark and caption; returns them.

    suffix: tsv or xlsx. Raises UserError as `export_lmms_eval` does.
    """
    label = _plain_name(load_result(run)["label"])
    files = []
    for benchmark, found in _questions(run).items():
        for index in range(max(len(rows) for rows in found.values())):
            lines = [_vlmevalkit_line(rows[index]) for rows in found.values() if index < len(rows)]
            model = label if index == 0 else f"{label}-caption{index + 1}"
            files.append(_write_frame(lines, out / model / f"{model}_{benchmark}.{suffix}"))
    return files


def _vlmevalkit_line(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "index": row["sample_id"],
        "question": row["question"],
        **dict(zip(ascii_uppercase, row["options"], strict=False)),
        "answer": row["gold"],
        "prediction": row["answer"] or "",
    }


def _write_frame(lines: Sequence[Mapping[str, Any]], file: Path) -> Path:
    import csv
    import io

    import pandas as pd

    frame = pd.DataFrame(lines)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".tsv":
        write_atomic(file, frame.to_csv(sep="\t", index=False, quoting=csv.QUOTE_ALL))
    elif file.suffix == ".xlsx":
        buffer = io.BytesIO()
        frame.to_excel(buffer, index=False)
        write_atomic(file, buffer.getvalue())
    else:
        raise UserError(f"{file.name}: a VLMEvalKit file ends in .tsv or .xlsx")
    return file


def _questions(run: Path) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Benchmark -> sample id -> its rows by caption, in the order of the run."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in read_samples(run):
        rotated = get_benchmark(row["benchmark"]).metric == "circular_accuracy"
        if rotated and row["gold"].startswith("["):
            raise UserError(
                f"{row['benchmark']}, question {row['sample_id']}: the rotations of a question stand in one row here, "
                "which these files cannot hold; leave this benchmark out of the run that is exported"
            )
        found.setdefault(row["benchmark"], {}).setdefault(row["sample_id"], []).append(row)
    return found


def _plain_name(label: str) -> str:
    """A label as a file name."""
    return "".join(char if char.isalnum() or char in "-." else "-" for char in label)


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else sum(values) / len(values)


def read_answers(file: Path) -> list[imported.Foreign]:
    """The answers of another toolkit's file: lmms-eval's samples JSONL, or VLMEvalKit's tsv, csv or xlsx.

    Raises UserError naming the file, and the row or the columns, that cannot be read.
    """
    if not file.is_file():
        raise UserError(f"no file {paths.shown(file)}")
    if file.suffix == ".jsonl":
        return _from_lmms(file)
    if file.suffix in (".tsv", ".csv", ".xlsx"):
        return _from_frame(_read_frame(file), file)
    raise UserError(
        f"{paths.shown(file)}: lmms-eval's samples end in .jsonl, VLMEvalKit's in .tsv, .csv or .xlsx"
    )


def _from_lmms(file: Path) -> list[imported.Foreign]:
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            answers = row["filtered_resps"]
            place = int(row["doc_id"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{paths.shown(file)}, line {number}: a sample of lmms-eval has doc_id and filtered_resps "
                f"({type(error).__name__}: {error})"
            ) from error
        while isinstance(answers, list) and len(answers) == 1:  # older versions nest them
            answers = answers[0]
        texts = tuple(str(text) for text in answers) if isinstance(answers, list) else (str(answers),)
        found.append(imported.Foreign(
            texts, place=place, sample_id=row.get("sample_id"), gold=row.get("target"), row=f"line {number}",
        ))  # fmt: skip
    return found


def _read_frame(file: Path) -> pd.DataFrame:
    import pandas as pd

    as_text: dict[str, Any] = {"dtype": str, "keep_default_na": False}  # "None" and "NA" are answers
    if file.suffix == ".xlsx":
        return pd.read_excel(file, **as_text)
    return pd.read_csv(file, sep="\t" if file.suffix == ".tsv" else ",", **as_text)


def _from_frame(frame: pd.DataFrame, file: Path) -> list[imported.Foreign]:
    missing = [name for name in ("index", "prediction") if name not in frame.columns]
    if missing:
        raise UserError(
            f"{paths.shown(file)}: no column {' and '.join(missing)}; it has {', '.join(map(str, frame.columns))}"
        )
    return [
        imported.Foreign(
            (row["prediction"],), sample_id=row["index"], question=row.get("question"), gold=row.get("answer"),
            row=f"row {number}",
        )
        for number, row in enumerate(frame.to_dict("records"), 2)
    ]  # fmt: skip


@command_line
def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m caprl_utils.prism.exchange", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="write a finished run in another toolkit's layout")
    out.add_argument(
        "run", type=Path, help="its folder, runs/<profile>/prism/NAME or runs/<profile>/vqa/NAME"
    )
    out.add_argument("--to", choices=("lmms-eval", "vlmevalkit"), required=True)
    out.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    out.add_argument("--xlsx", action="store_true", help="VLMEvalKit: Excel files instead of tsv")
    into = commands.add_parser("import", help="score another toolkit's answers")
    into.add_argument("file", type=Path)
    into.add_argument("--benchmark", required=True)
    into.add_argument("--profile", default="smoke")
    into.add_argument("--num-samples", type=int, help="as in the evaluation; the profile's number by default")
    into.add_argument("--name", required=True, help="of the run, runs/<profile>/vqa/NAME")
    arguments = parser.parse_args(argv)
    print(*(_export if arguments.command == "export" else _import)(arguments), sep="\n")
    return 0


def _export(arguments: argparse.Namespace) -> list[str]:
    if arguments.to == "lmms-eval":
        files = export_lmms_eval(arguments.run, arguments.out)
    else:
        files = export_vlmevalkit(arguments.run, arguments.out, "xlsx" if arguments.xlsx else "tsv")
    return [paths.shown(file) for file in files]


def _import(arguments: argparse.Namespace) -> list[str]:
    profile = load_profile(arguments.profile)
    prepare_process(profile)
    samples = load_samples(profile, [arguments.benchmark], arguments.num_samples)
    record = imported.evaluate_answers(
        profile, arguments.name, read_answers(arguments.file), samples, source=arguments.file.name
    )
    part = record["values"]["benchmarks"][arguments.benchmark]
    mean = "no score" if part["mean"] is None else f"{100 * part['mean']:.1f}"
    return [f"{arguments.benchmark} {mean}, n {part['num_samples']}, unparsed {part['unparsed']}"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
