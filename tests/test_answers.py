"""The answer parser: forms it reads, forms it refuses, and what it does with any text at all."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caprl_utils.answers import final_answer, first_capital, has_answer_mark, read_letter

STATED = [
    "B", " B", "(B)", "[B]", "B.", "B)", "B!", "B?", "B) red", "(B) red", "B. dog", "B: pig", "B (red)",
    "The answer is B", "The answer is (B).", "The answer is B) Vitamin C", "The correct option is (B).",
    "The best answer is B", "Answer: B", "ANSWER: B", "**B**", "**Answer: B**", "The answer: **B**",
    "Option B", "Choice: B", "answer is\nB", "B because it is red", "B is correct", "I'd go with B",
    "It's B", "$B$", '"B"', r"\boxed{B}", r"\boxed{\text{B}}", r"\textbf{B}",
    "B\n\nBecause the bar is red.", "B, not A", "so B", "The answer is B.\nExplanation: A is wrong",
]  # fmt: skip
UNCLEAR = [
    "", "   ", "None", "Vitamin C", "A dog", "It is a dog", "The answer is A dog", "A or B", "B, C", "B/C",
    "A. B", "Both A) and B)", "C) A", "The answer is not B", "B is wrong", "neither A nor B",
    "A and B are wrong, so C", "b", "(b)", "The answer is F", "F", "I think so", "red",
]  # fmt: skip


@pytest.mark.parametrize("text", STATED)
def test_strict_reads_a_stated_letter(text):
    assert read_letter(text, "ABCDE").letter == "B"


@pytest.mark.parametrize("text", UNCLEAR)
def test_strict_never_guesses(text):
    reading = read_letter(text, "ABCDE")
    assert reading.letter is None
    assert reading.reason


@pytest.mark.parametrize(
    ("text", "letter"),
    [(" B", "B"), ("B) red", "B"), ("Answer: B", "A"), ("answer j", None), ("J", None), ("I", "I"), ("", None)],
)  # fmt: skip
def test_first_capital_is_the_authors_rule(text, letter):
    assert first_capital(text) == letter


def test_the_letters_of_the_question_count_and_option_texts_only_on_request():
    assert read_letter("J", "ABCDEFGHIJ").letter == "J"
    assert read_letter("E", "ABCD").letter is None
    options = ["cat", "dog", "a red car"]
    assert read_letter("dog", "ABC").letter is None
    assert read_letter(" Dog. ", "ABC", options=options).source == "option_text"
    assert read_letter("A red  car", "ABC", options=options).letter == "C"
    assert read_letter("B", "ABC", options=options).source == "letter"
    assert read_letter("dog", "ABC", options=["dog", "dog", "cat"]).letter is None
    assert read_letter("A cat", "ABC", options=options).letter == "A"
    assert read_letter("A dog", "ABC", options=options).letter is None  # an article
    # capitals inside an option are no answers
    assert read_letter("B) A or C", "ABCD", options=["A", "A or C", "B", "none"]).letter == "B"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42", "42"),
        (" New York ", "New York"),
        (r"<think>so</think><answer>\boxed{42}</answer>", "42"),
        (r"<think>x</think>\boxed{1} and \boxed{2}", "2"),
        ("<think>a</think><think>b</think> red", "red"),
        ("<answer>first</answer> then <answer>second</answer>", "second"),
        ("<answer>done</answer><answer>cut off", "done"),
        ("<answer>cut off", "<answer>cut off"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\text{North America}}", "North America"),
        (r"\textbf{\text{B}}", "B"),
        (r"\boxed{open", r"\boxed{open"),
        (r"\boxed{\{B\}}", r"\{B\}"),
        (r"\boxed{a \boxed{b} c}", r"a \boxed{b} c"),
        ("", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@given(st.text(max_size=60) | st.text(alphabet="\\boxed{}answer<>/think text", max_size=80))
@settings(max_examples=80)
def test_any_text_gives_a_known_letter_or_none(text):
    assert (read_letter(text, "ABCD").letter or "A") in "ABCD"
    assert (first_capital(text) or "A") in "ABCDEFGHI"
    assert final_answer(text) == final_answer(text).strip()


def test_a_completion_stuck_in_a_loop_is_read_in_linear_time():
    assert final_answer("\\boxed{" * 20_000).startswith("\\boxed{")
    assert has_answer_mark(r"so \boxed{4}") and not has_answer_mark("so 4")
