"""What notebook 03 shows: questions asked by hand, captions to compare, noise of the reward, questions won and lost."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt

from caprl_utils import prompts
from caprl_utils.errors import UserError
from caprl_utils.image_sources import open_images
from caprl_utils.images import BadImageError
from caprl_utils.models.base import Request, Sampling, open_backend
from caprl_utils.records import Question
from caprl_utils.registry import drawn_source
from caprl_utils.rl.data import data_file, load_data
from caprl_utils.rl.readers import Reader
from caprl_utils.rl.rewards import CaptionTask, Round, draw_rounds, expected_scores, qa_rewards, sampled_scores
from caprl_utils.schema import RL, Experiment, Profile

if TYPE_CHECKING:
    from pandas import DataFrame
    from PIL.Image import Image


@dataclass(frozen=True)
class Example:
    """An image of the training set with its questions."""

    id: str
    image: Image
    questions: list[Question]


@dataclass(frozen=True)
class Outcome:
    """A caption, and each question of its image with the probability that the reader answers it rightly."""

    caption: str
    num_tokens: int
    chances: dict[str, float | None]

    @property
    def reward(self) -> float | None:
        """Mean over all questions; None when one could not be asked."""
        values = list(self.chances.values())
        return None if None in values else sum(values) / len(values)


def load_examples(profile: Profile, experiment: Experiment, count: int) -> list[Example]:
    """The first `count` images of the run's data set that can be opened."""
    file, limit = data_file(profile, experiment.data), profile.models.policy.max_pixels
    rows, pictures, _ = load_data(file, experiment.data, profile.rl.num_images, max_pixels=limit)
    found: list[Example] = []
    for row in rows:
        with suppress(BadImageError):
            image = pictures(row["image"])
            found.append(Example(row["id"], image, [Question(**q) for q in row["questions"]]))
        if len(found) == count:
            break
    return found


def statement(question: str, answer: str) -> str:
    """A sentence that answers a question: "What is the topic?", "rain" -> "The topic is rain."."""
    match = re.match(r"What is the (.+)\?$", question)
    return f"The {match[1]} is {answer}." if match else f"{question} {answer}."


def half(caption: str) -> str:
    """The first half of a caption's sentences: true, and terse."""
    sentences = re.split(r"(?<=\.)\s+", caption.strip())
    return " ".join(sentences[: max(1, len(sentences) // 2)])


def everything(questions: Sequence[Question]) -> str:
    """A caption that claims every option of every question: what a policy writes that hacks a weak reader."""
    return " ".join(statement(q.question, option) for q in questions for option in q.options)


def true_captions(profile: Profile, examples: Sequence[Example]) -> list[str]:
    """True captions of the images where their source draws them, else what the questions' answers state."""
    drawn = open_images(profile, "rl") if drawn_source(profile.images.source) else ()
    known = {image.id: image.meta.get("true_caption") for image in drawn}
    stated = [" ".join(statement(q.question, q.answer_text) for q in e.questions) for e in examples]
    return [known.get(e.id) or text for e, text in zip(examples, stated, strict=True)]


def _each_once(
    caption: str, questions: Sequence[Question], reader: Reader, settings: RL, *key: str
) -> tuple[list[Round], list[float | None]]:
    """Every question in an order that `key` decides, and the probability that the reader answers it rightly."""
    task = CaptionTask(caption, questions, key)
    rounds = draw_rounds(task, len(questions), "stratified", reader.words)
    return rounds, expected_scores(rounds, reader, settings)[0]


def ask(caption: str, questions: Sequence[Question], reader: Reader, settings: RL) -> list[dict[str, Any]]:
    """Every question once: what the reader was asked, and how likely it answers rightly, one row each."""
    rounds, scores = _each_once(caption, questions, reader, settings, "story")
    drawn, _ = sampled_scores(rounds, reader, settings)
    options = ["  ".join(r.request.prompt.splitlines()[-len(r.letters) :]) for r in rounds]
    return [
        {"question": r.question, "options": shown, "right": r.gold, "chance": score, "one draw": one}
        for r, shown, score, one in zip(rounds, options, scores, drawn, strict=True)
    ]


def mean_reward(captions: Sequence[str], examples: Sequence[Example], reader: Reader, settings: RL) -> float:
    """Mean expected reward of one caption per image, every question asked once. Raises UserError on a failure."""
    pairs = zip(captions, examples, strict=True)
    scores = [_each_once(c, e.questions, reader, settings, "story", e.id)[1] for c, e in pairs]
    return statistics.mean(sum(_all_known(row)) / len(row) for row in scores)


def _all_known(scores: list[float | None]) -> list[float]:
    if None in scores:
        raise UserError("the reader could not answer some questions; is its server up?")
    return scores


def noise(
    captions: Sequence[str], examples: Sequence[Example], reader: Reader, settings: RL, repeats: int
) -> list[dict[str, Any]]:
    """Standard deviation of the reward of a fixed caption over repeated draws, mean over captions, for each kind. Equal
    cost: every kind asks the reader `settings.rounds` questions per caption.
    """
    pairs = product(zip(captions, examples, strict=True), range(repeats))
    tasks = [CaptionTask(c, e.questions, ("noise", e.id, repeat)) for (c, e), repeat in pairs]
    table = []
    for kind, draw in product(("qa_sampled", "qa_expected"), ("replacement", "stratified")):
        how = settings.model_copy(update={"reward": kind, "question_draw": draw})
        rewards = _all_known(qa_rewards(tasks, reader, how).rewards)
        spreads = [statistics.stdev(rewards[i : i + repeats]) for i in range(0, len(rewards), repeats)]
        mean, std = statistics.mean(rewards), statistics.mean(spreads)
        table.append({"reward": kind, "draw": draw, "mean": mean, "std": std})
    return table


def outcomes(model: str, profile: Profile, examples: Sequence[Example], reader: Reader, settings: RL) -> list[Outcome]:
    """Greedy captions of a model (a path as in profiles), each question of their image asked once."""
    policy = profile.models.policy.model_copy(update={"path": model, "backend": "local"})
    requests = [Request(e.id, prompts.CAPTION, e.image) for e in examples]
    completions = open_backend(policy, profile).generate(requests, Sampling(profile.rl.max_completion_tokens))
    found = []
    for example, completion in zip(examples, completions, strict=True):
        if completion.text is None:
            raise UserError(f"{model} did not caption {example.id}: {completion.error}")
        rounds, scores = _each_once(completion.text, example.questions, reader, settings, example.id)
        chances = {r.question: score for r, score in zip(rounds, scores, strict=True)}
        found.append(Outcome(completion.text.strip(), completion.num_tokens, chances))
    return found


def won_and_lost(before: Outcome, after: Outcome) -> tuple[list[str], list[str]]:
    """Questions answered rightly (probability above one half) only after, and only before the training."""
    right = [{q for q, chance in one.chances.items() if (chance or 0) > 0.5} for one in (before, after)]
    won, lost = right[1] - right[0], right[0] - right[1]
    return [q for q in before.chances if q in won], [q for q in before.chances if q in lost]


_BLUE = "#0b3c6f"


def draw_curve(curve: DataFrame) -> None:
    """Reward, caption length and what GRPO learns from over the steps; thick: the mean of ten steps."""
    panels = [("reward",), ("completion_tokens",), ("group_std", "zero_variance_share")]
    rows = curve.set_index("step")[[name for panel in panels for name in panel]]
    how = {"subplots": panels, "color": _BLUE}
    smooth = rows.rolling(10, min_periods=1).mean()
    axes = smooth.plot(layout=(1, 3), figsize=(10, 2.6), style={"zero_variance_share": "--"}, **how)
    rows.plot(ax=axes, alpha=0.25, legend=False, ylim=(0, None), **how)
    plt.show()


def show_images(examples: Sequence[Example], texts: Sequence[str] = ()) -> None:
    """Each image beside a text, by default its id and its questions."""
    layout = {"figsize": (10, 2.6 * len(examples)), "width_ratios": [1, 3], "constrained_layout": True}
    axes = plt.subplots(len(examples), 2, squeeze=False, **layout)[1]
    texts = texts or ["\n".join([e.id, *(q.question for q in e.questions)]) for e in examples]
    for (left, right), example, text in zip(axes, examples, texts, strict=True):
        left.imshow(example.image)
        right.text(0, 1, text, va="top", fontsize=8, family="monospace")
        left.axis("off")
        right.axis("off")
    plt.show()


def show_captions(examples: Sequence[Example], before: Sequence[Outcome], after: Sequence[Outcome]) -> None:
    """Each image beside its captions before and after the training, with the questions won and lost."""
    texts = []
    for old, new in zip(before, after, strict=True):
        won, lost = won_and_lost(old, new)
        parts = {"before": old.caption, "after": new.caption, "won": " ".join(won), "lost": " ".join(lost)}
        lines = (textwrap.fill(f"{name.upper()}: {text or 'none'}", 95) for name, text in parts.items())
        texts.append("\n".join(lines))
    show_images(examples, texts)
