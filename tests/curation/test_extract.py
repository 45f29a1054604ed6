"""Extraction never guesses: a corpus of malformed answers, and properties that hold for any text."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caprl_utils import prompts
from caprl_utils.curation.extract import extract
from caprl_utils.records import Question, text_key

CORPUS = Path(__file__).parents[1] / "data" / "malformed_answers.jsonl"
CASES = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
REASONS = {reason for case in CASES for reason in case["reasons"]}  # any_text below finds no other


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_corpus(case):
    questions, rejected = extract(case["text"], case["finish_reason"])
    assert [piece.reason for piece in rejected] == case["reasons"]
    assert len(questions) == case["questions"]


def written(number: int, question: str, options: list[str], answer: int) -> str:
    letter = prompts.LETTERS[answer]
    head = f"**{number}. {question}**{prompts.format_options(options)}"
    return f"{head}\n**Answer:** {letter}) {options[answer]}"


WORDS = st.text("abcxyzé漢字ب0123456789 $\\{}^_()[].,?!'\"/+-", max_size=30)


def tidy(parts: tuple[str, str]) -> str:
    """One line without spaces at its ends, that starts with the first part."""
    return " ".join("".join(parts).split())


OPTION = st.tuples(st.sampled_from(["o", "é", "$x$", "漢", "17", "-1", "(a)", "[0, 1)", "A", "B) "]), WORDS).map(tidy)
STATEMENT = st.tuples(st.sampled_from(["What", "Où", "哪", "$x$ is", "3.5"]), WORDS).map(tidy)
OPTIONS = st.lists(OPTION, min_size=4, max_size=4, unique_by=text_key)
QUESTION = st.tuples(STATEMENT, OPTIONS, st.integers(0, 3))


@settings(max_examples=50)
@given(st.lists(QUESTION, max_size=5, unique_by=lambda question: text_key(question[0])))
def test_what_is_written_as_asked_comes_back_unchanged(questions):
    text = "\n".join(written(number, *question) for number, question in enumerate(questions, start=1))
    found, rejected = extract(text)
    if questions:
        assert rejected == []
    assert found == [
        Question(question=question, options=tuple(options), answer=prompts.LETTERS[answer], number=number)
        for number, (question, options, answer) in enumerate(questions, start=1)
    ]


@given(OPTIONS, st.integers(0, 3), st.integers(0, 3))
def test_an_answer_of_another_letter_is_never_taken(options, answer, stated):
    text = written(1, "what?", options, answer)
    head, _, _ = text.rpartition("\n")
    found, rejected = extract(f"{head}\n**Answer:** {prompts.LETTERS[stated]}) {options[answer]}")
    assert bool(found) == (stated == answer)
    assert [piece.reason for piece in rejected] == ([] if found else ["answer text is not that of its letter"])


HEADS = st.sampled_from([
    "**{n}. {q}**", "**{n}) {q}**", "**{n}.** {q}", "{n}. **{q}**", "#### {n}. **{q}**", "### {n}. {q}",
    "({n}) **{q}**", "**Question {n}:** {q}", "**Question {n}: {q}**", "### Question {n}\n**{q}**",
    "**Question {n}**\n{q}", "**Q{n}.** {q}", "**Q{n}: {q}**", "**{n}：{q}**", "**{n}、{q}**", "**问题{n}：** {q}",
])  # fmt: skip
MARKS = st.sampled_from([
    "{x}) {t}", "{x}. {t}", "({x}) {t}", "{x}: {t}", "{x}：{t}", "（{x}） {t}", "- {x}) {t}", "   - {x}. {t}",
    "* {x}) {t}", "**{x})** {t}", "- **{x}.** {t}", "**{x}) {t}**",
])  # fmt: skip
GIVEN = st.sampled_from([
    "**Answer:** {x}) {t}", "**Answer:** {x}", "**Answer: {x}**", "**Answer: {x}) {t}**", "Answer: ({x})",
    "- **Answer:** {x}.", "**Correct Answer:** {x}. {t}", "**Answer：** {x}） {t}", "**答案：** {x}", "*Answer:* {x}",
    "The correct answer is {x}) {t}", "**Answer:**\n{x}) {t}", "**Answer**: Option {x}",
])  # fmt: skip
AROUND = st.sampled_from(["", "\n", "\n------\n", "\n**Explanation:** look.\n1. It is so.\n2. Look.\n\n"])
BEFORE = st.sampled_from(["", "Here are five questions:\n", "1. A chart.\n2. Four bars.\n", "**Questions**\n\n"])


@settings(max_examples=150)
@given(HEADS, MARKS, GIVEN, AROUND, BEFORE, st.booleans(), st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_usual_layouts_are_read_with_their_right_answers(head, mark, given_, around, before, small, answers):
    options = ["red", "10² mW", "10² MW", "102 mW"]
    blocks = []
    for number, answer in enumerate(answers, start=1):
        letters = "abcd" if small and ":" not in mark and "：" not in mark else "ABCD"
        lines = [head.format(n=number, q=f"What is bar {number}?")]
        lines += [mark.format(x=x, t=t) for x, t in zip(letters, options, strict=True)]
        blocks.append("\n".join([*lines, "", given_.format(x="ABCD"[answer], t=options[answer])]))
    found, rejected = extract(before + f"{around}\n".join(blocks))
    assert rejected == [] and [q.answer for q in found] == ["ABCD"[answer] for answer in answers]
    assert all(q.options == tuple(options) and q.question == f"What is bar {q.number}?" for q in found)


PIECES = st.sampled_from(
    ["**1. q?**", "**2. r?**", "A) one", "B) two", "C) three", "D) four", "**Answer:** B) two", "Answer: A",
     "**Answer:** B", "**", "1. q", "\n", "---", "A) ", "E) five", "text", "答案", "\ufffd"]
)  # fmt: skip
TEXT = st.lists(PIECES, max_size=20).map("\n".join) | st.text(max_size=200)


@settings(max_examples=150)
@given(TEXT, st.sampled_from(["stop", "length"]))
def test_any_text_gives_sound_questions_or_reasons(text, finish_reason):
    found, rejected = extract(text, finish_reason)
    assert found or rejected
    for question in found:
        assert 1 <= question.number <= 5
        assert len(question.options) == 4
        assert question.answer in text
    assert {piece.reason for piece in rejected} <= REASONS
    assert max(Counter(text_key(q.question) for q in found).values(), default=1) == 1


WHOLE = written(1, "what?", ["one", "two", "three", "four"], 1)


def test_cutting_a_text_never_changes_an_answer():
    for end in range(len(WHOLE)):
        found, _ = extract(WHOLE[:end], "length")
        assert all(question.answer_text == "two" for question in found)


@given(st.text(max_size=80))
def test_without_its_marks_nothing_is_a_question_whatever_follows(tail):
    assert not extract(f"{WHOLE}\n{tail}".replace("**", ""))[0]
