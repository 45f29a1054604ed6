"""Speed and noise of the reward, for `make bench`.

    python -m caprl_utils.rl.bench        one vLLM server for the mini world's reader, and this process

The tasks are the mini world's: true captions of its pictures cut at several lengths, a question about every fact. Wall
times: say what else runs on the machine.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.curation.images import open_images
from caprl_utils.errors import UserError, command_line
from caprl_utils.models import open_backend
from caprl_utils.records import Question
from caprl_utils.rl import bench_clients
from caprl_utils.rl.reader import BackendReader, Reader, open_reader
from caprl_utils.rl.rewards import CaptionTask, QASettings, qa_rewards
from caprl_utils.rl.story import statement
from caprl_utils.rl.train import STAGE, run_name
from caprl_utils.schema import Profile

GOALS = {"qa_expected": 5.0, "qa_sampled": 3.0}  # times a client that sends one request per question
_TEN_TOKENS, _RELEASED, _OURS = "ten tokens by OpenAI's client", "a client per request", "our client"
_BASELINES = {
    _TEN_TOKENS: bench_clients.ten_tokens,
    _RELEASED: bench_clients.released,
    _OURS: bench_clients.ours,
}
_RELEASED_IMAGES = 2  # it takes 0.2 s a caption
SHARE_GOAL = 0.15  # of a training step
GROUP = 8  # captions of an image, as in a rollout
REPEATS = 3
_OPTIONS = 4


def mini_tasks(profile: Profile, images: int, seed: int = 0) -> list[CaptionTask]:
    """`GROUP` captions of each image, from one fact to all, with a question about every fact."""
    tasks = []
    for item in open_images(profile, "rl"):
        if len(tasks) == images * GROUP:
            break
        facts = item.meta.get("facts")
        if not facts:
            raise UserError("the bench asks about known facts: it needs images.source mini-world")
        rng = random.Random(f"{seed}/{item.id}")
        questions = [_question(rng, key, value, list(facts.values())) for key, value in facts.items()]
        for index in range(GROUP):
            told = rng.sample(list(facts.items()), 1 + index * (len(facts) - 1) // (GROUP - 1))
            caption = " ".join(statement(f"What is the {key}?", value) for key, value in told)
            tasks.append(CaptionTask(caption, questions, (seed, 0, item.id, index)))
    return tasks


def _question(rng: random.Random, key: str, value: str, values: Sequence[str]) -> Question:
    others = sorted({v for v in values if v != value})
    options = [value, *rng.sample(others, min(_OPTIONS - 1, len(others)))]
    rng.shuffle(options)
    return Question(
        question=f"What is the {key}?", options=tuple(options), answer="ABCD"[options.index(value)]
    )


def bench_rewards(images: int = 48, repeats: int = REPEATS) -> list[dict[str, Any]]:
    """Rewards per second over one vLLM server: expected and sampled against one request per question.

    Each way is timed `repeats` times in turn with other draws of the questions; the median counts. The goals hold
    against OpenAI's library sampling ten tokens; a slower and a faster baseline stand beside it.
    """
    from caprl_utils.models.server import serve

    profile = load_profile("mini")
    model = profile.models.reward_reader.model_copy(update={"batch_size": 64})
    settings = _settings(profile)
    with serve(model, max_model_len=1024) as server:
        backend = open_backend(server.config, profile)
        reader = open_reader(server.config, profile)
        baselines = {
            name: partial(ask, backend=backend, settings=settings) for name, ask in _BASELINES.items()
        }
        ways = {
            "qa_expected": lambda tasks: qa_rewards(tasks, reader, settings),
            "qa_sampled": lambda tasks: qa_rewards(tasks, reader, replace(settings, kind="qa_sampled")),
        }
        rates = _rates(ways | baselines, profile, images, repeats, fewer={_RELEASED: _RELEASED_IMAGES})
    return [
        _row(f"{ours} over vLLM, against {name}", rates[ours], rates[name], goals.get(ours), images * GROUP)
        for ours in ways
        for name, goals in ((_TEN_TOKENS, GOALS), (_RELEASED, {}), (_OURS, {}))
    ]


def bench_packed(images: int = 16, repeats: int = REPEATS) -> list[dict[str, Any]]:
    """Rewards per second in this process: packed prompts against separate ones."""
    profile = load_profile("mini")
    settings = _settings(profile)
    packed = open_reader(profile.models.reward_reader, profile)
    plain = BackendReader(open_backend(profile.models.reward_reader, profile))
    ways = {
        "packed": lambda tasks: qa_rewards(tasks, packed, settings).rewards,
        "baseline": lambda tasks: qa_rewards(tasks, plain, settings).rewards,
    }
    rates = _rates(ways, profile, images, repeats)
    name = "reward qa_expected in this process, packed prompts"
    return [_row(name, rates["packed"], rates["baseline"], 1.0, images * GROUP)]


def bench_noise(images: int = 8, repeats: int = 20) -> list[dict[str, Any]]:
    """Standard deviation of a fixed caption's reward over draws, at four questions each: the paper's dice against
    the expected answer, questions drawn with replacement and each once.
    """
    profile = load_profile("mini")
    reader: Reader = open_reader(profile.models.reward_reader, profile)
    tasks = mini_tasks(profile, images)
    paper = _spread(
        tasks, reader, replace(_settings(profile), kind="qa_sampled", draw="replacement"), repeats
    )
    rows = []
    for kind, draw in (
        ("qa_expected", "replacement"),
        ("qa_sampled", "stratified"),
        ("qa_expected", "stratified"),
    ):
        ours = _spread(tasks, reader, replace(_settings(profile), kind=kind, draw=draw), repeats)
        row = _row(f"noise of the reward, {kind}, {draw}", ours, paper, 1.0, len(tasks) * repeats, "std")
        rows.append(row | {"ratio": paper / ours if ours else None})
    return rows


def reward_share(run_folder: Path) -> dict[str, Any]:
    """Share of a training's time that the reward takes, from its curve."""
    lines = (run_folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    spent, whole = (sum(step[name] for step in steps) for name in ("seconds_reward", "seconds"))
    row = _row(
        f"reward's share of a step, {run_folder.name}", spent / whole, SHARE_GOAL, 1.0, len(steps), "share"
    )
    return row | {"ratio": SHARE_GOAL / (spent / whole)}


def _settings(profile: Profile) -> QASettings:
    rl = profile.rl
    return QASettings("qa_expected", rl.rounds, rl.question_draw, rl.reader_temperature, min_letter_mass=0.5)


def _spread(tasks: Sequence[CaptionTask], reader: Reader, settings: QASettings, repeats: int) -> float:
    drawn = [replace(t, key=("noise", *t.key, n)) for t in tasks for n in range(repeats)]
    rewards = qa_rewards(drawn, reader, settings).rewards
    if None in rewards:
        raise UserError("the reader failed on some questions")
    groups = [rewards[i : i + repeats] for i in range(0, len(rewards), repeats)]
    return statistics.mean(statistics.stdev(group) for group in groups)


def _rates(
    ways: Mapping[str, Callable[[Sequence[CaptionTask]], Any]],
    profile: Profile,
    images: int,
    repeats: int,
    fewer: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Way -> captions per second, the median of the repeats. fewer: images of ways that are slow."""
    for way in ways.values():
        way(mini_tasks(profile, 2, seed=-1))  # warm
    found: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for number, (name, way) in enumerate(ways.items()):
            tasks = mini_tasks(profile, (fewer or {}).get(name, images), seed=repeat * len(ways) + number)
            start = perf_counter()
            way(tasks)
            found[name].append(len(tasks) / (perf_counter() - start))
    return {name: statistics.median(rates) for name, rates in found.items()}


def _row(
    name: str, ours: float, baseline: float, goal: float | None, n: int, unit: str = "captions/s"
) -> dict[str, Any]:
    ratio = ours / baseline
    return {
        "name": name,
        "ours": ours,
        "baseline": baseline,
        "ratio": ratio,
        "goal": goal,
        "unit": unit,
        "n": n,
    }


def bench_shares() -> list[dict[str, Any]]:
    """The reward's share of a step in the main trainings of mini that are there; none is made for it."""
    profile = load_profile("mini")
    folders = [paths.RUNS / profile.name / STAGE / run_name("caprl", seed) for seed in profile.rl.seeds]
    return [reward_share(folder) for folder in folders if (folder / "result.json").is_file()]


def bench() -> list[dict[str, Any]]:
    """All rows."""
    return [*bench_rewards(), *bench_packed(), *bench_noise(), *bench_shares()]


@command_line
def main() -> int:
    """Command line; returns the exit status."""
    rows = bench()
    for row in rows:
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
