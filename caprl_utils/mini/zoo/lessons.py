"""What the small models are taught: reading captions, looking at pictures, captioning, writing questions.

Every function builds one packed example from a seeded generator; sizes of the lesson (facts, options) come from the
curriculum of :mod:`caprl_utils.mini.zoo.train`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from caprl_utils import prompts
from caprl_utils.mini import vocabulary as words
from caprl_utils.mini.tokenizer import SPECIAL, shared_tokenizer
from caprl_utils.mini.world import Fact, Picture, caption, distractors, known_fact
from caprl_utils.mini.zoo.packing import IMAGE_PREFIX, TURN_OPEN, Packed

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Style:
    """How a captioner tells a picture: shares of facts told and of told facts that are wrong."""

    told: tuple[float, float] = (1.0, 1.0)  # a share drawn uniformly from this range
    wrong: float = 0.0
    shuffled: bool = False


def spoiled(rng: random.Random, fact: Fact, share: float) -> Fact:
    """The fact, or with probability ``share`` a false one with the same key."""
    if rng.random() >= share:
        return fact
    return Fact(fact.key, rng.choice([v for v in fact.options if v != fact.value]), fact.options)


def styled_facts(rng: random.Random, facts: Sequence[Fact], style: Style) -> list[Fact]:
    """The facts that a captioner of this style tells, in the order it tells them; at least one."""
    count = max(1, round(len(facts) * rng.uniform(*style.told)))
    chosen = sorted(rng.sample(range(len(facts)), count))
    if style.shuffled:
        rng.shuffle(chosen)
    return [spoiled(rng, facts[i], style.wrong) for i in chosen]


def multiple_choice(
    rng: random.Random,
    fact: Fact,
    others: Sequence[Fact],
    answer: str | None,
    count: int = 4,
    extra: bool = True,
) -> tuple[str, str]:
    """A question with options and the letter to answer (``unknown`` when ``answer`` is not to be had)."""
    options = [fact.value, *distractors(rng, fact, others)][:count]
    rng.shuffle(options)
    if extra:
        options = [*options, prompts.CANNOT_ANSWER]
    text = fact.question + prompts.format_options(options)
    if answer is None:
        return text, prompts.LETTERS[len(options) - 1] if extra else UNKNOWN
    return text, prompts.LETTERS[options.index(answer)]


def reading(rng: random.Random, picture: Picture, num_facts: int, num_options: int, missing: float) -> Packed:
    """Questions about a caption of ``num_facts`` facts: two short ones and four with options.

    With ``missing`` above 0 also the rest of a reader's life: facts that the caption does not tell, empty captions,
    the option that it cannot be answered, and questions that need no caption.
    """
    easy = missing == 0
    facts = list(picture.facts)
    rng.shuffle(facts)
    told, silent = facts[:num_facts], facts[num_facts:] or facts[-1:]
    if not easy and rng.random() < 0.06:
        told, silent = [], facts
    text = caption(told, picture.kind) if told or rng.random() < 0.5 else ""
    head, middle = prompts.READ.split("{caption}")
    packed = Packed(TURN_OPEN + head + text + middle.split("{question}")[0])
    for number in range(6):
        known = not easy and rng.random() < 0.1
        absent = not told or rng.random() < missing
        fact = (
            known_fact(rng.choice(list(words.KNOWLEDGE))) if known else rng.choice(silent if absent else told)
        )
        answer = fact.value if known or fact in told else None
        if number < 2:
            packed.ask(fact.question, f"{prompts.ANSWER_PREFILL} {answer or UNKNOWN}")
        else:
            question, letter = multiple_choice(
                rng, fact, told, answer, num_options, not easy and rng.random() < 0.7
            )
            packed.ask(question, f"{prompts.ANSWER_PREFILL} {letter}")
    return packed


def looking(
    rng: random.Random, picture: Picture, styles: Sequence[Style], questions: int = 4, write: float = 0.0
) -> Packed:
    """Captions and questions about an image: a caption per style, short questions and questions with options.

    A question with options is answered by the option's text: to name its letter as well took more training than the
    zoo has (reports/lab-log.md), and the answer parser reads both.
    """
    packed = Packed(IMAGE_PREFIX)
    for style in styles:
        packed.ask(prompts.CAPTION, caption(styled_facts(rng, picture.facts, style), picture.kind))
    for number in range(questions):
        fact = rng.choice(picture.facts if rng.random() < 0.9 or not picture.known else picture.known)
        if number % 2:
            packed.ask(prompts.look_question(fact.question), f"{prompts.ANSWER_PREFILL} {fact.value}")
        else:
            question, _ = multiple_choice(rng, fact, picture.facts, fact.value, extra=False)
            packed.ask(prompts.look_question(question), f"{prompts.ANSWER_PREFILL} {fact.value}")
    if rng.random() < write:
        packed.ask(prompts.WRITE_QUESTIONS, written_questions(rng, picture))
    return packed


def guessing(rng: random.Random, picture: Picture) -> Packed:
    """Questions without their image: known facts are answered, all others are ``unknown``."""
    packed = Packed(TURN_OPEN)
    for number in range(4):
        fact = rng.choice(picture.known if picture.known and rng.random() < 0.5 else picture.facts)
        answer = fact.value if fact in picture.known else None
        if number % 2:
            packed.ask(prompts.look_question(fact.question), f"{prompts.ANSWER_PREFILL} {answer or UNKNOWN}")
        else:
            question, _ = multiple_choice(rng, fact, picture.facts, fact.value, extra=False)
            packed.ask(prompts.look_question(question), f"{prompts.ANSWER_PREFILL} {answer or UNKNOWN}")
    return packed


def written_questions(rng: random.Random, picture: Picture, leaking: float = 0.25, count: int = 5) -> str:
    """Five questions in the Markdown form of ``WRITE_QUESTIONS``; each leaks with probability ``leaking``.

    The right option comes first, a habit of the writer that every later stage undoes by shuffling: where it could stand
    anywhere, the small writer named its letter at chance.
    """
    facts = rng.sample(picture.facts, min(count, len(picture.facts)))
    known = rng.sample(picture.known, len(picture.known))
    blocks = []
    for number, fact in enumerate((facts + facts)[:count], start=1):
        fact = known.pop() if known and rng.random() < leaking else fact
        options = [fact.value, *distractors(rng, fact, picture.facts)]
        blocks.append(
            f"**{number}. {fact.question}**{prompts.format_options(options)}\n**Answer:** A) {fact.value}"
        )
    return "\n".join(blocks)


MOST_OPTIONS = 5


def repeated(rng: random.Random, size: int, length: int = 56) -> tuple[list[int], list[bool]]:
    """Ids of random words in which one stretch comes twice, and which ids can be copied from its first coming.

    Length and distance of the two vary: at a fixed distance a model learns to look that far back, not for the word.
    """
    half = rng.randint(8, 24)
    others = rng.sample(range(len(SPECIAL), size), length - half)
    start = rng.randint(0, length - 2 * half)
    ids = others + others[start : start + half]
    copied = length - half + 1
    return ids, [False] * copied + [True] * (length - copied)


def lettered(rng: random.Random, size: int, num_options: int) -> list[int]:
    """Ids of a list of random words as options, one of them again, and its letter: "A) x B) y ? y The answer is B"."""
    marks, letters, (mark, prefill) = letter_ids()
    options = rng.sample(range(len(SPECIAL), size), num_options)
    asked = rng.randrange(num_options)
    listed = [i for pair in zip(marks, options, strict=False) for i in pair]
    return [*listed, mark, options[asked], prefill, letters[asked]]


def recalled(rng: random.Random, size: int, num_pairs: int) -> list[int]:
    """Ids of pairs of random words, one key again, and its value: "k v l w ? l The answer is w"."""
    chosen = rng.sample(range(len(SPECIAL), size), 2 * num_pairs)
    asked = 2 * rng.randrange(num_pairs)
    _, _, (mark, prefill) = letter_ids()
    return [*chosen, mark, chosen[asked], mark, prefill, chosen[asked + 1]]


def bound(rng: random.Random, size: int, num_pairs: int) -> tuple[list[int], list[int], int, int]:
    """Random keys and values that share a token each, the key asked, and its value: as visual tokens bind them."""
    chosen = rng.sample(range(len(SPECIAL), size), 2 * num_pairs)
    asked = rng.randrange(num_pairs)
    return chosen[:num_pairs], chosen[num_pairs:], chosen[asked], chosen[num_pairs + asked]


@functools.lru_cache
def letter_ids() -> tuple[list[int], list[int], list[int]]:
    """Ids of the option marks (a new line, "A)", ...), of the letters (" A", ...), and of "?" and the prefill."""
    convert = shared_tokenizer().convert_tokens_to_ids
    letters = prompts.LETTERS[:MOST_OPTIONS]
    return (
        convert([f"\n{letter})" for letter in letters]),
        convert([f" {letter}" for letter in letters]),
        convert(["?", prompts.ANSWER_PREFILL]),
    )
