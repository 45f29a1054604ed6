"""Direct VQA: a model looks at the image and answers (paper, Tables 1 and 2).

The same registry, reading of answers and scorer as Prism, without captions: a score differs from Prism's
only by what the model sees.

    python -m caprl_utils.prism.vqa --profile mini --model zoo:vlm-3b --name base-3b

How it departs from the toolkits that the paper may have used:
1. Answers are decoded greedily after "The answer is" by default (profile.prism.image_reader); one that is exactly an
   option's text counts as its letter.
2. One image a question: a question about several is left out, counted and listed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from caprl_utils import prompts
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError, command_line
from caprl_utils.models import Backend, open_backend
from caprl_utils.notebook import prepare_process
from caprl_utils.prism import judging, prism_scores
from caprl_utils.prism.benchmarks import pretraining_benchmarks
from caprl_utils.prism.prism import image_ids, load_samples, project_modules, samples_hash
from caprl_utils.prism.prism_answers import ReaderMode, Task, answer_all, answer_id
from caprl_utils.prism.scoring import Judge, Mode
from caprl_utils.runs import Run
from caprl_utils.schema import ModelConfig, Profile

if TYPE_CHECKING:
    from caprl_utils.prism.loaders import Sample

STAGE = "vqa"
PRETRAINING = "pretraining"  # stands for the twelve benchmarks of Tables 1 and 2


def evaluate_vqa(
    profile: Profile,
    name: str,
    model: Backend,
    samples: Sequence[Sample],
    *,
    reader_mode: ReaderMode | None = None,
    scoring: Mode | None = None,
    judge: Judge | None = None,
    label: str | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Ask `model` every question about its image and score the answers; returns the run's record.

    The run is runs/<profile>/vqa/<name>: answers.jsonl, samples.parquet (Prism's columns, without captions),
    result.json (values by benchmark and their average, intervals over images, unparsed answers). A stopped
    evaluation goes on where it was, a finished one is read back.

    samples: see `prism.load_samples`. reader_mode, scoring and seed: the profile's by default. judge: for
    metrics that need one, the profile's by default; without any those samples have no score and are counted.
    label: the model's name in samples.parquet.
    Raises UserError when an answer could not be had; the finished rows stay on disk.
    """
    seed = profile.seed if seed is None else seed
    mode, scoring = reader_mode or profile.prism.image_reader, scoring or profile.prism.scoring
    judge = judge or judging.judge_of(profile)
    prism_scores.check_modes(scoring, mode)
    asked, left_out = one_image_each(samples)
    parts = {
        "vqa": {"reader": mode, "bootstrap_draws": profile.prism.bootstrap_draws, "scoring": scoring},
        "model": model.model_hash,
        "judge": judging.fingerprint(judge),
        "prompts": prompts.prompt_hash(),
        "samples": samples_hash(asked),
        "seed": seed,
        "label": label or name,
    }
    with Run.open(profile, STAGE, name, parts, [__name__, *project_modules(model)]) as run:
        if run.complete:
            return run.result
        tasks = [Task(answer_id(sample, 0), sample, 0, None) for sample in asked]
        answers = answer_all(tasks, model, mode, run.rows("answers"), seed)
        facts = {
            t.id: {"image_id": image_ids(t.sample)[0], "caption": None, "num_tokens": None, "finish_reason": None}
            for t in tasks
        }  # fmt: skip
        rows = prism_scores.score_rows(tasks, answers, facts, scoring, judging.stored(judge, run))
        prism_scores.write_samples(run.folder / "samples.parquet", rows, label or name)
        summary = prism_scores.summarise(rows, profile.prism.bootstrap_draws, profile.seed)
        return run.finish(
            **summary, unit="sample", seeds=[seed], label=label or name, scoring=scoring,
            model={"name": model.name, "mode": mode}, judge=judge.name if judge else None, left_out=left_out,
        )  # fmt: skip


def one_image_each(samples: Sequence[Sample]) -> tuple[list[Sample], dict[str, list[str]]]:
    """The samples with one image, and the ids of the others by benchmark.

    Raises UserError where nothing would be left of a benchmark.
    """
    asked = [sample for sample in samples if len(sample.images) == 1]
    left_out: dict[str, list[str]] = {}
    for sample in samples:
        if len(sample.images) != 1:
            left_out.setdefault(sample.benchmark, []).append(sample.id)
    gone = sorted(set(left_out) - {sample.benchmark for sample in asked})
    if gone or not asked:
        raise UserError(
            f"no question with exactly one image in {', '.join(gone) or 'the samples'}: a model is asked about "
            "one image at a time"
        )
    return asked, left_out


@command_line
def main(argv: Sequence[str]) -> int:
    """Command line; prints the scores and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m caprl_utils.prism.vqa", description="Ask a model about images and score it."
    )
    parser.add_argument("--profile", default="smoke", help="smoke | mini | one_gpu | paper")
    parser.add_argument("--model", required=True, help="zoo:NAME, a folder, or a hub id")
    parser.add_argument("--name", required=True, help="of the run, runs/<profile>/vqa/NAME")
    parser.add_argument("--revision", help="commit of a hub id")
    parser.add_argument("--url", nargs="+", help="ask these OpenAI-compatible servers instead of loading it")
    parser.add_argument(
        "--benchmarks", nargs="+",
        help=f"keys of the registry, or '{PRETRAINING}' for Tables 1 and 2; the profile's by default",
    )  # fmt: skip
    parser.add_argument("--num-samples", type=int, help="of each benchmark; the profile's number by default")
    parser.add_argument("--reader", choices=("choice", "greedy", "sampled"), help="the profile's by default")
    parser.add_argument("--scoring", choices=("standard", "caprl"), help="the profile's by default")
    arguments = parser.parse_args(argv)
    print(_evaluate(arguments))
    return 0


def _evaluate(arguments: argparse.Namespace) -> str:
    profile = load_profile(arguments.profile)
    prepare_process(profile)
    names = arguments.benchmarks
    if names == [PRETRAINING]:
        names = [facts.key for facts in pretraining_benchmarks()]
    samples = load_samples(profile, names, arguments.num_samples)
    server = {"backend": "endpoint", "base_urls": arguments.url} if arguments.url else {}
    model = ModelConfig(path=arguments.model, revision=arguments.revision, **server)
    record = evaluate_vqa(
        profile, arguments.name, open_backend(model, profile), samples,
        reader_mode=arguments.reader, scoring=arguments.scoring,
    )  # fmt: skip
    return _lines(record)


def _lines(record: dict[str, Any]) -> str:
    """One line a benchmark: score with interval in percent, questions, unparsed and unscored answers."""
    values = record["values"]
    found = {
        **{key: part["mean"] for key, part in values["benchmarks"].items()},
        "average": values["average"],
    }
    lines = []
    for key, mean in found.items():
        low_high = record["intervals"].get(key)
        score = "no score" if mean is None else f"{100 * mean:5.1f}"
        interval = f" [{100 * low_high[0]:.1f}, {100 * low_high[1]:.1f}]" if low_high else ""
        part = values["benchmarks"].get(key)
        counts = (
            f"  n {part['num_samples']}, unparsed {part['unparsed']}, unscored {part['unscored']}"
            if part
            else ""
        )
        left = len(record["left_out"].get(key, ()))
        lines.append(f"{key:<16} {score}{interval}{counts}" + (f", left out {left}" if left else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
