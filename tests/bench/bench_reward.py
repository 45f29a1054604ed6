"""Speed and noise of the reward: over one vLLM server for the mini world's reader, and in this process.

The tasks are the mini world's: true captions of its pictures cut at several lengths, a question about every fact. Over
vLLM it is compared with the usual way, one request a question and ten tokens sampled (the model's own end is ignored).
"""

import json
import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import harness

from caprl_utils import paths
from caprl_utils.answers import first_capital
from caprl_utils.config import load_profile
from caprl_utils.image_sources import open_images
from caprl_utils.models.base import Sampling, open_backend
from caprl_utils.models.endpoint import EndpointBackend, Post
from caprl_utils.models.server import Options, serve
from caprl_utils.records import Question
from caprl_utils.rl.experiments import STAGE, run_name
from caprl_utils.rl.readers import MAX_ANSWER_TOKENS, Reader, open_reader
from caprl_utils.rl.rewards import CaptionTask, draw_rounds, qa_rewards
from caprl_utils.rl.story import statement
from caprl_utils.schema import RL, Profile

GOALS = {"qa_expected": 5.0, "qa_sampled": 3.0}  # times the usual way
SHARE_GOAL = 0.15  # of a training step
ROUNDS = 3
GROUP = 8  # captions of an image, as in a rollout
IMAGES, IMAGES_HERE, IMAGES_NOISE, DRAWS = 48, 16, 8, 20
IN_FLIGHT = 64


def rows() -> list[dict[str, Any]]:
    """All rows; the reward's share of a step only of main trainings of mini that are there."""
    profile = load_profile("mini")
    folders = [paths.RUNS / profile.name / STAGE / run_name("caprl", seed) for seed in profile.rl.seeds]
    shares = [reward_share(folder) for folder in folders if (folder / "result.json").is_file()]
    return [*over_vllm(profile), *in_process(profile), *noise(profile), *shares]


def tasks_of(profile: Profile, images: int, seed: int) -> list[CaptionTask]:
    """`GROUP` captions of each image, from one fact to all, with a question about every fact."""
    tasks = []
    for _, item in zip(range(images), open_images(profile, "rl"), strict=False):
        rng, facts = random.Random(f"{seed}/{item.id}"), item.meta["facts"]
        questions = []
        for key, value in facts.items():
            others = sorted({*facts.values()} - {value})
            options = [value, *rng.sample(others, min(3, len(others)))]
            rng.shuffle(options)
            answer = "ABCD"[options.index(value)]
            questions.append(Question(question=f"What is the {key}?", options=tuple(options), answer=answer))
        for index in range(GROUP):
            told = rng.sample(list(facts.items()), 1 + index * (len(facts) - 1) // (GROUP - 1))
            caption = " ".join(statement(f"What is the {key}?", value) for key, value in told)
            tasks.append(CaptionTask(caption, questions, (seed, 0, item.id, index)))
    return tasks


def _settings(profile: Profile, kind: str = "qa_expected", draw: str | None = None) -> RL:
    return profile.rl.model_copy(update={"reward": kind, "question_draw": draw or profile.rl.question_draw})


def over_vllm(profile: Profile) -> list[dict[str, Any]]:
    """Captions per second over one vLLM server: expected and sampled against a request per question."""
    model = profile.models.reward_reader.model_copy(update={"batch_size": IN_FLIGHT})
    with serve(model, options=Options(max_model_len=1024)) as server:
        backend, reader = open_backend(server.config, profile), open_reader(server.config, profile)
        ways = {kind: partial(qa_rewards, reader=reader, settings=_settings(profile, kind)) for kind in GOALS}
        usual = "ten tokens a question"
        ways[usual] = partial(one_by_one, backend=backend, settings=_settings(profile))
        rates = _rates(profile, ways, IMAGES)
    return [
        harness.row(f"{kind} over vLLM, against {usual}", rates[kind], rates[usual], goal, "captions/s", IMAGES * GROUP)
        for kind, goal in GOALS.items()
    ]


def one_by_one(tasks: Sequence[CaptionTask], backend: EndpointBackend, settings: RL) -> float:
    """The mean reward by one request per question; the first capital of the sampled answer counts."""
    sampling = Sampling(MAX_ANSWER_TOKENS, temperature=settings.reader_temperature)
    rounds = (r for task in tasks for r in draw_rounds(task, settings.rounds, settings.question_draw))
    bodies = ((r.gold, backend.chat_body(r.request, sampling) | {"ignore_eos": True}) for r in rounds)
    posts = (Post(gold, body, lambda a: a["choices"][0]["message"]["content"]) for gold, body in bodies)
    return statistics.mean(first_capital(text) == gold for gold, text in backend.client.run(posts))


def in_process(profile: Profile) -> list[dict[str, Any]]:
    """Captions per second in this process: packed prompts against separate ones."""
    plain = Reader(open_backend(profile.models.reward_reader, profile))
    readers = {"packed": open_reader(profile.models.reward_reader, profile), "plain": plain}
    ways = {name: partial(qa_rewards, reader=r, settings=_settings(profile)) for name, r in readers.items()}
    rates = _rates(profile, ways, IMAGES_HERE)
    name, n = "reward qa_expected in this process, packed prompts", IMAGES_HERE * GROUP
    return [harness.row(name, rates["packed"], rates["plain"], 1.0, "captions/s", n)]


def _rates(profile: Profile, ways: dict[str, Callable], images: int) -> dict[str, list[float]]:
    """Way -> captions per second of each round."""

    def timed(way: Callable, tasks: list[CaptionTask]) -> float:
        start = perf_counter()
        way(tasks)
        return len(tasks) / (perf_counter() - start)

    for way in ways.values():
        way(tasks_of(profile, 2, seed=-1))  # warm
    timed_ways = {name: partial(timed, way) for name, way in ways.items()}
    return harness.side_by_side(timed_ways, lambda _, number: tasks_of(profile, images, number), ROUNDS)


def noise(profile: Profile) -> list[dict[str, Any]]:
    """Standard deviation of a fixed caption's reward over draws, at four questions each: the paper's dice against
    the expected answer, questions drawn with replacement and each once.
    """
    reader, tasks = (open_reader(profile.models.reward_reader, profile), tasks_of(profile, IMAGES_NOISE, seed=0))
    drawn = [t._replace(key=("noise", *t.key, n)) for t in tasks for n in range(DRAWS)]

    def spread(kind: str, draw: str) -> float:
        rewards = qa_rewards(drawn, reader, _settings(profile, kind, draw)).rewards
        return statistics.mean(statistics.stdev(rewards[i : i + DRAWS]) for i in range(0, len(rewards), DRAWS))

    paper, n = spread("qa_sampled", "replacement"), len(drawn)
    ways = (("qa_expected", "replacement"), ("qa_sampled", "stratified"), ("qa_expected", "stratified"))
    names = {way: f"noise of the reward, {way[0]}, {way[1]}" for way in ways}
    return [harness.row(names[way], spread(*way), paper, 1.0, "std", n, lower=True) for way in ways]


def reward_share(run_folder: Path) -> dict[str, Any]:
    """Share of a training's time that the reward takes, from its curve."""
    lines = (run_folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()
    spent, whole = (sum(json.loads(line)[name] for line in lines) for name in ("seconds_reward", "seconds"))
    name = f"reward's share of a step, {run_folder.name}"
    return harness.row(name, spent / whole, SHARE_GOAL, 1.0, "share", len(lines), lower=True, target=True)
