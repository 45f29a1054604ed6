"""What the small models are taught: reading captions, looking at pictures, captioning, writing and judging.

Every function builds one example from a seeded generator; its size (facts, options) comes from the lesson's level.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from caprl_utils import prompts
from caprl_utils.mini import vocabulary as words
from caprl_utils.mini.canvas import FACES, SIZE, SIZES, Canvas, widest
from caprl_utils.mini.pages import PAPERS
from caprl_utils.mini.render import CELL, CELLS
from caprl_utils.mini.tokenizer import FINAL, SPECIAL, shared_tokenizer
from caprl_utils.mini.world import KINDS, Fact, Picture, caption, distractors, picture
from caprl_utils.mini.zoo.models import SIDE
from caprl_utils.mini.zoo.packing import IMAGE_PREFIX, TURN_OPEN, Packed

UNKNOWN = "unknown"
MOST_OPTIONS = 5
Facts = Sequence[Fact]


def spoiled(rng: random.Random, fact: Fact) -> Fact:
    """A false fact with the same key."""
    return replace(fact, value=rng.choice([v for v in fact.options if v != fact.value]))


def other_picture(rng: random.Random) -> Picture:
    """Some picture of the zoo's own split."""
    return picture("zoo", rng.randrange(10**6), rng.choice(KINDS))


# Habits on random words, before any caption


@functools.lru_cache
def letter_ids() -> tuple[list[int], list[int], list[int]]:
    """Ids of the option marks (a new line, "A)", ...), of the letters (" A", ...), and of "?" and the prefill."""
    convert, letters = shared_tokenizer().convert_tokens_to_ids, prompts.LETTERS[:MOST_OPTIONS]
    marks, spaced = [f"\n{letter})" for letter in letters], [f" {letter}" for letter in letters]
    return convert(marks), convert(spaced), convert(["?", prompts.ANSWER_PREFILL])


def repeated(rng: random.Random, size: int) -> tuple[list[int], list[bool]]:
    """Ids of random words in which one stretch comes twice, and which ids can be copied from its first coming.

    Length and distance of the two vary: at a fixed distance a model learns to look that far back, not for the word.
    """
    length, half = 56, rng.randint(8, 24)
    others = rng.sample(range(len(SPECIAL), size), length - half)
    start = rng.randint(0, length - 2 * half)
    copied = length - half + 1
    return others + others[start : start + half], [False] * copied + [True] * (length - copied)


def lettered(rng: random.Random, size: int, num_options: int) -> list[int]:
    """Ids of a list of random words as options, one of them again, and its letter: "A) x B) y ? y The answer is B"."""
    marks, letters, (mark, prefill) = letter_ids()
    options = rng.sample(range(len(SPECIAL), size), num_options)
    asked = rng.randrange(num_options)
    listed = [i for pair in zip(marks, options, strict=False) for i in pair]
    return [*listed, mark, options[asked], prefill, letters[asked]]


@functools.lru_cache
def _joints() -> tuple[list[int], list[int]]:
    """Ids of the phrases between key and value: those before a value, those before a key."""
    after, before = {" is"}, {" as the"}
    for form in (f for relation in words.RELATIONS.values() for f in relation.statements if "{h}" in f):
        (after if form.index("{h}") < form.index("{v}") else before).add(form.split("}")[1].split(" {")[0])
    convert = shared_tokenizer().convert_tokens_to_ids
    return convert(sorted(after)), convert(sorted(before))


def recalled(rng: random.Random, size: int, num_pairs: int) -> list[int]:
    """Ids of keys and values in the sentences of the world, one key again, and its value: "k is v, ... ? l The answer
    is w". In a third of the sentences the value comes first.
    """
    chosen = rng.sample(range(len(SPECIAL), size), 2 * num_pairs)
    asked = 2 * rng.randrange(num_pairs)
    after, before = _joints()
    told = []
    for key, value in zip(chosen[::2], chosen[1::2], strict=True):
        told += [value, rng.choice(before), key] if rng.random() < 0.33 else [key, rng.choice(after), value]
    _, _, (mark, prefill) = letter_ids()
    filler = rng.sample(range(len(SPECIAL), size), 3 * (5 - num_pairs)) if num_pairs < 5 else []
    return [*filler, *told, mark, chosen[asked], mark, prefill, chosen[asked + 1]]


# Reading


@dataclass(frozen=True)
class Level:
    """How hard captions and questions of the reader's lesson are."""

    statements: int  # at most
    options: int
    forms: tuple[int, ...] = (0, 1, 2, 2)  # phrasings in use; value before key is learned last
    missing: float = 0.0  # share of questions whose fact the caption does not tell
    noise: float = 0.0  # share of captions with repeats, contradictions and statements about other pictures


READING_LEVELS = (
    Level(1, 2, (0,)), Level(2, 4, (0,)), Level(3, 4), Level(5, 4), Level(8, 4), Level(11, 4, missing=0.1),
    Level(17, 4, missing=0.25, noise=0.6),
)  # fmt: skip
"""Curriculum of the readers. The last level has captions of up to 70 tokens: longer than any evaluation allows."""


def multiple_choice(
    rng: random.Random, fact: Fact, others: Facts, count: int = 4, extra: bool = False
) -> tuple[str, list[str]]:
    """A question with its options, shuffled; `extra` adds the one that it cannot be answered."""
    options = [fact.value, *distractors(rng, fact, others)][:count]
    rng.shuffle(options)
    options += [prompts.CANNOT_ANSWER] * extra
    return fact.question(rng.randrange(2)) + prompts.format_options(options), options


def told_statements(rng: random.Random, shown: Picture, level: Level) -> list[Fact]:
    """What a caption of the lesson states, in its order: facts, and in noisy ones repeats, false and foreign ones."""
    facts = list(shown.facts)
    if rng.random() < 0.5:
        rng.shuffle(facts)
    most = rng.randint(max(1, level.statements // 2), level.statements)
    if rng.random() >= level.noise:
        return facts[:most]
    told = facts[: rng.randint(1, len(facts))]
    while len(told) < most:
        source = rng.random()
        if source < 0.45:
            told.append(rng.choice(told))
        elif source < 0.6:
            told.append(spoiled(rng, rng.choice(facts)))
        else:
            told += rng.sample(other_picture(rng).facts, rng.randint(1, 3))
    order = told[: level.statements]
    if rng.random() < 0.5:
        rng.shuffle(order)
    return order


def read_answer(rng: random.Random, fact: Fact, told: Facts, options: list[str] | None) -> str:
    """What a reader should say of a question: a value (of `options` where there are any), or that it cannot know.

    Of several values told for one key it takes any, and rather says that it cannot know; what is not told is unknown,
    unless everybody guesses it.
    """
    can_pass = bool(options) and prompts.CANNOT_ANSWER in options
    said = sorted({t.value for t in told if t.key == fact.key})
    if can_pass and len(said) > 1:
        return prompts.CANNOT_ANSWER
    said = [s for s in said if options is None or s in options] or ([fact.value] if fact.usual and not said else [])
    if said:
        return rng.choice(said)
    return prompts.CANNOT_ANSWER if can_pass else UNKNOWN


def reading(rng: random.Random, shown: Picture, level: Level) -> Packed:
    """Questions about a caption: two short ones and four with options."""
    told = told_statements(rng, shown, level)
    if level.missing and rng.random() < 0.05:
        told = []
    text = caption(told, shown.kind, [rng.choice(level.forms) for _ in told])
    if not told and rng.random() < 0.5:
        text = ""
    packed = Packed(TURN_OPEN + prompts.READ.partition("{question}")[0].replace("{caption}", text))
    stated = {t.key for t in told}
    for number in range(6):
        absent = rng.random() < level.missing
        fact = rng.choice([f for f in shown.facts if (f.key in stated) != absent] or shown.facts)
        if number < 2:
            question, answer = fact.question(rng.randrange(2)), read_answer(rng, fact, told, None)
        else:
            extra = bool(level.missing) and rng.random() < 0.6
            question, options = multiple_choice(rng, fact, told, level.options, extra)
            found = read_answer(rng, fact, told, options)
            answer = prompts.LETTERS[options.index(found)] if found in options else UNKNOWN
        packed.ask(question, f"{prompts.ANSWER_PREFILL} {answer}")
    return packed


# Looking

WRITTEN = [*words.CITIES, *words.GOODS, *words.ITEMS, *words.NAMES, *words.MONTHS, *words.SERIES, *words.CHART_TOPICS,
           *words.GOODS_TOPICS, *words.DOCUMENT_TYPES, *words.YEARS, *words.NUMBERS[:28]]  # fmt: skip
"""What stands written in pictures."""


def pages(rng: random.Random, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of single words: (count, 3, SIDE, SIDE) bytes and (count * IMAGE_TOKENS,) ids of the word in each cell.

    A word belongs to the cell of its middle; cells without one have -1.
    """
    shown, wanted = [], torch.full((count, CELLS, CELLS), -1)
    for number in range(count):
        page = Canvas(Image.new("RGB", (SIZE, SIZE), rng.choice(PAPERS)))
        for row in range(CELLS):
            column = rng.choice((0, 0, 1))
            while column < CELLS:
                word, face, size = rng.choice(WRITTEN), rng.choice([*FACES]), rng.choice(SIZES)
                text = rng.choice((word, word.capitalize(), word.capitalize(), word.upper()))
                room = widest([text], size, face)
                x = min(max(CELL * (column + rng.random()), room / 2 + 4), SIZE - room / 2 - 4)
                right = page.text((x, CELL * row + rng.choice((14, 28, 28, 42))), text, size, "", face)
                middle = int((right - room / 2) // CELL)
                wanted[number, row, min(middle, CELLS - 1)] = shared_tokenizer().convert_tokens_to_ids(f" {word}")
                column = max(column, middle) + 2 + (room > 1.6 * CELL)
        shown.append(np.asarray(page.image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2), wanted.flatten()


@dataclass(frozen=True)
class Style:
    """How a lesson describes pictures: all facts, or a short run that ends after each with probability `stop`."""

    stop: float | None = None
    false: float = 0.0  # share of the facts told


def described(rng: random.Random, shown: Picture, style: Style) -> tuple[list[Fact], list[int]]:
    """What a caption states, and the phrasings: all facts in reading order, or a run of some, as alt texts have them.

    A run begins at a fact about the whole picture, or at the first of its labels. A few are long: where they ended at
    five, RL led to captions that were noise from the sixth statement on (reports/lab-log.md).
    """
    facts = shown.facts
    if style.stop:
        start = rng.choice([i for i, fact in enumerate(facts) if not fact.head or not facts[i - 1].head])
        length = next((n for n in range(1, len(facts)) if rng.random() < style.stop), len(facts))
        facts = facts[start : start + length]
    told = [spoiled(rng, fact) if rng.random() < style.false else fact for fact in facts]
    return told, [int(rng.random() < 0.25) for _ in told]


def captions(rng: random.Random, shown: Picture, styles: Sequence[Style]) -> list[str]:
    """A caption in each style."""
    told = (described(rng, shown, style) for style in styles)
    return [caption(facts, shown.kind, forms) for facts, forms in told]


def looking(
    rng: random.Random, shown: Picture, texts: Sequence[str] = (), write: float = 0.0, blind: bool = False
) -> Packed:
    """Captions of an image, and two questions with options and two short ones about it.

    A question with options is answered by the option's text: to name its letter as well took more training than the
    zoo has (reports/lab-log.md), and the answer parser reads both. write: share of images about which questions are
    written. blind: questions without their image; what is nearly always the same is answered, all others ``unknown``.
    """
    packed = Packed(TURN_OPEN if blind else IMAGE_PREFIX)
    for text in texts:
        packed.ask(prompts.CAPTION, text)
    for number in range(4):
        fact = rng.choice(shown.known if blind and rng.random() < 0.5 else shown.facts)
        question = fact.question(rng.randrange(2))
        if number % 2 == 0:
            question, _ = multiple_choice(rng, fact, shown.facts)
        answer = UNKNOWN if blind and not fact.usual else fact.value
        packed.ask(prompts.look_question(question), f"{prompts.ANSWER_PREFILL} {answer}")
    if not blind and rng.random() < write:
        packed.ask(prompts.WRITE_QUESTIONS, _written_questions(rng, shown))
    return packed


def _written_questions(rng: random.Random, shown: Picture) -> str:
    """Five questions in the Markdown form of ``WRITE_QUESTIONS``; some of them leak.

    The right option comes first, a habit of the writer that every later stage undoes by shuffling: where it could stand
    anywhere, the small writer named its letter at chance.
    """
    facts = rng.sample(shown.facts, min(5, len(shown.facts)))
    if rng.random() < 0.5 and not any(fact.usual for fact in facts):
        facts[-1] = rng.choice(shown.known)
    blocks = []
    for number, fact in enumerate(facts, start=1):
        options = [fact.value, *distractors(rng, fact, shown.facts)]
        head = f"**{number}. {fact.question(rng.randrange(2))}**{prompts.format_options(options)}"
        blocks.append(f"{head}\n**Answer:** A) {fact.value}")
    return "\n".join(blocks)


# Judging

POOLS = {"short": (1, 4), "long": (4, 12)}
"""Statements of a caption in each pool of rated captions: one judge has seen short ones alone, one long ones."""
VERIFIED = 4
"""Sentences an image that the verifier sees, half of them false."""
RATER_NOISE = 0.12  # ours: a rater and the utility below then agree on about 85 % of pairs


def utility(told: Facts, shown: Picture) -> float:
    """What raters go by: the share of the picture that a caption tells, less the share of it that is false."""
    true = {fact.key for fact in told if fact in shown.facts}
    false = sum(fact not in shown.facts for fact in told)
    return len(true) / len(shown.facts) - false / max(1, len(told))


def _rated(rng: random.Random, shown: Picture, pool: str) -> list[Fact]:
    """What a caption of a pool states: facts, some of them false, some about other pictures, some twice."""
    wanted = rng.randint(*POOLS[pool])
    facts = sorted(rng.sample(range(len(shown.facts)), min(wanted, len(shown.facts))))
    false = rng.choice((0.0, 0.0, 0.15, 0.4))
    told = [spoiled(rng, shown.facts[i]) if rng.random() < false else shown.facts[i] for i in facts]
    while len(told) < wanted:
        told.insert(rng.randrange(len(told) + 1), rng.choice([*told, *other_picture(rng).facts]))
    return told


def preferred(rng: random.Random, shown: Picture) -> tuple[Packed, list[bool], list[bool]]:
    """An image with a pair of captions of either pool to be scored, whether raters prefer the first of each, and of
    every statement made, in order, whether it is true.

    One model plays both judges of the paper's Figure 1c, told apart by the question that it is asked: `prompts.RATE`
    with the short pool, UnifiedReward's (`prompts.UNIFIED`) with the long one; it is the verifier of sentences as well
    (`prompts.VERIFY`). In a third of the pairs the second is the first with values changed. The digit is a place
    holder: the lesson scores it.
    """
    packed, first_wins, true = Packed(IMAGE_PREFIX), [], []
    for pool in POOLS:
        first, second = _rated(rng, shown, pool), _rated(rng, shown, pool)
        if rng.random() < 0.33:
            second = [spoiled(rng, fact) if rng.random() < 0.4 else fact for fact in first]
        for told in (first, second):
            true += [fact in shown.facts for fact in told]
            text = caption(told, shown.kind, [int(rng.random() < 0.25) for _ in told])
            if pool == "short":
                packed.ask(prompts.RATE.format(caption=text), f"{prompts.SCORE_PREFILL} 3")
            else:
                packed.ask(prompts.UNIFIED.format(question=prompts.CAPTION, caption=text), f"{FINAL} 3")
        ahead = utility(first, shown) - utility(second, shown)
        first_wins.append(ahead + rng.gauss(0, RATER_NOISE) > 0)
    for _ in range(VERIFIED):
        fact = rng.choice(shown.facts)
        if rng.random() < 0.5:
            fact = spoiled(rng, fact) if rng.random() < 0.7 else rng.choice(other_picture(rng).facts)
        true.append(fact in shown.facts)
        sentence = fact.sentence(int(rng.random() < 0.25))
        packed.ask(prompts.VERIFY.format(sentence=sentence), f"{prompts.ANSWER_PREFILL} {'BA'[true[-1]]}")
    return packed, first_wins, true
