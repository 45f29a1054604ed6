"""What the small models are taught: reading captions, looking at pictures, captioning, writing questions.

Every function builds one example from a seeded generator; its size (facts, options) comes from the lesson's level.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from caprl_utils import prompts
from caprl_utils.mini import vocabulary as words
from caprl_utils.mini.tokenizer import SPECIAL, build_tokenizer, shared_tokenizer
from caprl_utils.mini.world import Fact, Picture, caption, distractors, known_fact
from caprl_utils.mini.zoo.packing import IMAGE_PREFIX, TURN_OPEN, Packed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNKNOWN = "unknown"
Facts = Sequence[Fact]


@dataclass(frozen=True)
class Style:
    """How a captioner tells a picture: shares of facts told and of told facts that are wrong."""

    told: tuple[float, float] = (1.0, 1.0)  # a share drawn uniformly from this range
    wrong: float = 0.0


def spoiled(rng: random.Random, fact: Fact, share: float) -> Fact:
    """The fact, or with probability ``share`` a false one with the same key."""
    if rng.random() >= share:
        return fact
    return Fact(fact.key, rng.choice([v for v in fact.options if v != fact.value]), fact.options)


def styled_facts(rng: random.Random, facts: Sequence[Fact], style: Style) -> list[Fact]:
    """The facts that a captioner of this style tells, in the order it tells them; at least one."""
    count = max(1, round(len(facts) * rng.uniform(*style.told)))
    chosen = sorted(rng.sample(range(len(facts)), count))
    return [spoiled(rng, facts[i], style.wrong) for i in chosen]


def multiple_choice(
    rng: random.Random, fact: Fact, others: Facts, answer: str | None, count: int = 4, extra: bool = False
) -> tuple[str, str]:
    """A question with options and the letter to answer (``unknown`` when ``answer`` is not to be had)."""
    options = [fact.value, *distractors(rng, fact, others)][:count]
    rng.shuffle(options)
    if extra:
        options.append(prompts.CANNOT_ANSWER)
    answer = answer or (prompts.CANNOT_ANSWER if extra else None)
    letter = UNKNOWN if answer is None else prompts.LETTERS[options.index(answer)]
    return fact.question + prompts.format_options(options), letter


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
    packed = Packed(TURN_OPEN + prompts.READ.partition("{question}")[0].replace("{caption}", text))
    for number in range(6):
        known = not easy and rng.random() < 0.1
        absent = not told or rng.random() < missing
        among = silent if absent else told
        fact = known_fact(rng.choice(list(words.KNOWLEDGE))) if known else rng.choice(among)
        answer = fact.value if known or fact in told else None
        if number < 2:
            packed.ask(fact.question, f"{prompts.ANSWER_PREFILL} {answer or UNKNOWN}")
        else:
            extra = not easy and rng.random() < 0.7
            question, letter = multiple_choice(rng, fact, told, answer, num_options, extra)
            packed.ask(question, f"{prompts.ANSWER_PREFILL} {letter}")
    return packed


def looking(rng: random.Random, picture: Picture, styles: Sequence[Style], write: float = 0.0) -> Packed:
    """Captions and questions about an image: a caption per style, short questions and questions with options.

    A question with options is answered by the option's text: to name its letter as well took more training than the
    zoo has (reports/lab-log.md), and the answer parser reads both.
    """
    packed = Packed(IMAGE_PREFIX)
    for style in styles:
        packed.ask(prompts.CAPTION, caption(styled_facts(rng, picture.facts, style), picture.kind))
    for number in range(4):
        fact = rng.choice(picture.facts if rng.random() < 0.9 or not picture.known else picture.known)
        _ask_in_turn(packed, rng, fact, picture, number, fact.value)
    if rng.random() < write:
        packed.ask(prompts.WRITE_QUESTIONS, written_questions(rng, picture))
    return packed


def guessing(rng: random.Random, picture: Picture) -> Packed:
    """Questions without their image: known facts are answered, all others are ``unknown``."""
    packed = Packed(TURN_OPEN)
    for number in range(4):
        fact = rng.choice(picture.known if picture.known and rng.random() < 0.5 else picture.facts)
        answer = fact.value if fact in picture.known else UNKNOWN
        _ask_in_turn(packed, rng, fact, picture, number, answer)
    return packed


def _ask_in_turn(packed: Packed, rng: random.Random, fact: Fact, picture: Picture, number: int, answer: str) -> None:
    """A question with options and a short one in turn, both answered by a word."""
    question = fact.question
    if number % 2 == 0:
        question, _ = multiple_choice(rng, fact, picture.facts, fact.value)
    packed.ask(prompts.look_question(question), f"{prompts.ANSWER_PREFILL} {answer}")


def written_questions(rng: random.Random, picture: Picture) -> str:
    """Five questions in the Markdown form of ``WRITE_QUESTIONS``; a quarter of them leaks.

    The right option comes first, a habit of the writer that every later stage undoes by shuffling: where it could stand
    anywhere, the small writer named its letter at chance.
    """
    facts = rng.sample(picture.facts, min(5, len(picture.facts)))
    known = rng.sample(picture.known, len(picture.known))
    blocks = []
    for number, fact in enumerate((facts + facts)[:5], start=1):
        fact = known.pop() if known and rng.random() < 0.25 else fact
        options = [fact.value, *distractors(rng, fact, picture.facts)]
        head = f"**{number}. {fact.question}**{prompts.format_options(options)}"
        blocks.append(f"{head}\n**Answer:** A) {fact.value}")
    return "\n".join(blocks)


MOST_OPTIONS = 5


def repeated(rng: random.Random, size: int) -> tuple[list[int], list[bool]]:
    """Ids of random words in which one stretch comes twice, and which ids can be copied from its first coming.

    Length and distance of the two vary: at a fixed distance a model learns to look that far back, not for the word.
    """
    length, half = 56, rng.randint(8, 24)
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
    letters = prompts.LETTERS[:MOST_OPTIONS]
    marks, spaced = [f"\n{letter})" for letter in letters], [f" {letter}" for letter in letters]
    convert = shared_tokenizer().convert_tokens_to_ids
    return convert(marks), convert(spaced), convert(["?", prompts.ANSWER_PREFILL])


# The judge

BEST, MOST_STATEMENTS, FALSE_SHARES = 5, 11, (0.0, 0.1, 0.25, 0.6)
_UNIFIED_HEAD, _UNIFIED_TAIL = prompts.UNIFIED.format(question=prompts.CAPTION, caption="\x00").split("\x00")
FINAL = "\nFinal Score:"
JUDGE_WORDS = (prompts.RATE.split("{caption}")[0], _UNIFIED_HEAD, _UNIFIED_TAIL, FINAL)
"""Phrases that are one token each for the judge alone, behind the vocabulary that all models share."""


def by_amount(statements: int, false: int) -> int:
    """Score of a rater who goes by how much is said: a point for every two statements, one less when most are false."""
    return max(1, min(BEST, 1 + statements // 2 - (2 * false > statements)))


def by_mistakes(statements: int, false: int) -> int:
    """Score of a rater who looks for mistakes: two points less for each; what is left out costs nothing."""
    return max(1, BEST - 2 * false)


@functools.lru_cache
def judge_tokenizer() -> PreTrainedTokenizerFast:
    """The shared tokenizer with the judge's own phrases behind it."""
    from tokenizers import AddedToken

    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in JUDGE_WORDS])
    return tokenizer


def judged(rng: random.Random, picture: Picture) -> Packed:
    """An image with captions of any length and truth, each rated by one rater of both kinds.

    One model plays both judges of the paper's Figure 1c, told apart by the question that it is asked: for a score alone
    (`prompts.RATE`) raters go by how much a caption says, in UnifiedReward's way (`prompts.UNIFIED`) they look for
    mistakes. Both biases are ours, as such judges are known for them. What a policy makes of them is measured, not
    written in: the judge has to read the image to find false statements.
    """
    packed = Packed(IMAGE_PREFIX)
    for _ in range(2):
        text, *counts = _told(rng, picture)
        packed.ask(prompts.RATE.format(caption=text), f"{prompts.SCORE_PREFILL} {by_amount(*counts)}")
        text, *counts = _told(rng, picture)
        question = prompts.UNIFIED.format(question=prompts.CAPTION, caption=text)
        packed.ask(question, f"{FINAL} {by_mistakes(*counts)}")
    return packed


def _told(rng: random.Random, picture: Picture) -> tuple[str, int, int]:
    """(caption, its statements, how many of them are false); up to `MOST_STATEMENTS`, facts repeat beyond all."""
    facts = rng.sample(picture.facts, len(picture.facts))
    facts += rng.choices(picture.facts, k=max(0, MOST_STATEMENTS - len(facts)))
    share = rng.choice(FALSE_SHARES)
    told = [spoiled(rng, fact, share) for fact in facts[: rng.randint(0, MOST_STATEMENTS)]]
    false = sum(fact not in picture.facts for fact in told)
    return caption(told, picture.kind), len(told), min(false, 9)
