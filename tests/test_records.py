"""Rows in the schema of CapRL-QA-75K and back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from caprl_utils.records import ImageQA, Question, text_key

TEXT = st.text(min_size=1, max_size=20).map(str.strip).filter(bool)
OPTIONS = st.lists(TEXT.filter(text_key), min_size=2, max_size=10, unique_by=text_key)


@st.composite
def questions(draw):
    options = tuple(draw(OPTIONS))
    answer = "ABCDEFGHIJ"[draw(st.integers(0, len(options) - 1))]
    return Question(question=draw(TEXT), options=options, answer=answer)


@settings(max_examples=40)
@given(st.lists(questions(), max_size=3))
def test_rows_go_to_the_released_layout_and_back(found):
    row = ImageQA(id="x", image=b"png", path=None, questions=tuple(found))
    assert ImageQA.from_row(row.to_row()) == row


@pytest.mark.parametrize(
    ("options", "answer", "problem"),
    [(("red", "blue"), "C", "not one of AB"), (("red", "Red."), "A", "same text"), (("red",), "A", "1 options"),
     (("red", " "), "A", "empty"), (("red", "blue"), "AB", "not one of"), (("red", "2") * 6, "A", "12 options")],
)  # fmt: skip
def test_unsound_questions_are_refused(options, answer, problem):
    with pytest.raises(ValidationError, match=problem):
        Question(question="What?", options=options, answer=answer)


def test_choices_without_their_letters_are_refused():
    with pytest.raises(ValueError, match=r"does not start with 'B\)'"):
        Question.from_ground_truth({"question": "What?", "choices": ["A) red", "blue"], "answer": "A"})


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("mW", "MW", False), ("5 mW", "5 MW", False), ("10²", "102", False), ("10²", "10^2", True), ("x", "X", False),
     ("x₁", "x1", False), ("Red.", "red", True), ("YES", "yes", True), ("No", "no", True), ("kPa", "KPA", False),
     ("Ａ ｂｃｄ", "A bcd", True), ("é", "e\u0301", True), ("MPa", "mPa", False), ("㎽", "mW", True)],
)  # fmt: skip
def test_units_and_powers_tell_options_apart_and_the_case_of_words_does_not(one, other, same):
    assert (text_key(one) == text_key(other)) == same
