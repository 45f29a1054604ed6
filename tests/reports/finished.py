"""Finished runs with known scores, written by the same code that real runs use."""

import json

from caprl_utils.prism import scores, told
from caprl_utils.runs import Run

RECIPE = ["caprl_utils.errors"]
MINI = ("mini-chart", "mini-scene")


def row(benchmark, n, score, **more):
    """A row of samples.parquet: the one question about image n of a benchmark."""
    about = {"sample_id": f"s{n}", "image_id": f"{benchmark}/i{n}", "caption_index": 0, "caption": "said",
             "num_tokens": None, "finish_reason": "stop", "question": "What is it?", "options": [], "gold": "7",
             "answer": "7", "letter_mass": None, "parsed": "7", "reason": None}  # fmt: skip
    return {"benchmark": benchmark, "score": score, **about, **dict.fromkeys(told.COLUMNS), **more}


def evaluation(profile, stage, name, rows, captions=1):
    """An evaluation with these rows."""
    rows = [row | {"model": name} for row in rows]
    parts = {"said": [(row["caption"], row["score"]) for row in rows]}
    with Run.open(profile, stage, name, parts, RECIPE) as run:
        scores.write_samples(run.folder / "samples.parquet", rows, name)
        summary = scores.summarise(rows, profile.prism.bootstrap_draws, profile.seed)
        reader = {"name": "r", "mode": "choice"}
        run.finish(**summary, unit="sample", label=name, captions_per_image=captions, reader=reader)


def answered(profile, stage, name, right, tokens=None, benchmarks=MINI, captions=1, unscored=()):
    """An evaluation in which the first `right` of every 20 of 40 images are answered right. unscored: benchmarks, or
    samples of one (benchmark, number), that have no score.
    """
    rows = [
        row(benchmark, n, None if {benchmark, (benchmark, n)} & {*unscored} else float(n % 20 < right),
            caption_index=index, caption=f"caption {index} of {n}", num_tokens=tokens)
        for benchmark in benchmarks for n in range(40) for index in range(captions)
    ]  # fmt: skip
    evaluation(profile, stage, name, rows, captions)


def training(profile, name, images=40, tokens=20, rises=True):
    """A training by RL with its curve."""
    experiment, seed = name.split("-seed")
    about = {"name": experiment, "description": "as in the paper", "rl": {"group_size": 8},
             "reward": {"judge": "qa"}, "data": {"file": "curation/main/qa.parquet"}}  # fmt: skip
    rows = [{"step": n, "reward": 0.3 + 0.03 * n * rises, "completion_tokens": tokens + n} for n in range(1, 13)]
    with Run.open(profile, "rl", name, {"questions": "q"}, RECIPE) as run:
        (run.folder / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {"steps": 12, "reward_first": 0.25, "reward_last": 0.7}
        run.finish(values=values, n=images, unit="image", seeds=[int(seed)], experiment=about)
