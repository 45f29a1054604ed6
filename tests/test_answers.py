"""The answer parser: forms it reads, forms it refuses, and what it does with any text at all."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caprl_utils.answers import Letter, final_answer, first_capital, read_letter, short_answer
from caprl_utils.files import text_lines

FILE = Path(__file__).parent / "data" / "letter-replies.jsonl"
REPLIES = [json.loads(line) for _, line in text_lines(FILE)]


@pytest.mark.parametrize("clear", [True, False])
def test_replies_are_read_right_or_not_at_all(clear):
    """411 replies that state an answer, 357 that state none, two, or only look like it."""
    rows = [row for row in REPLIES if (row["letter"] is not None) == clear]
    read = [(row, read_letter(row["reply"], row["letters"], row["options"])) for row in rows]
    assert len(rows) > 250 and not [(row, found) for row, found in read if found.letter != row["letter"]]


FORMS = ["{}", "{}.", "({})", "**{}**", "The answer is {}.", "The answer is {} because it is.", "So {}."]


@given(st.permutations("abcdefgh"), st.integers(2, 8), st.data())
@settings(max_examples=80, deadline=None)
def test_a_stated_letter_is_a_letter_whatever_the_options_are(texts, count, data):
    letters, letter = "ABCDEFGH"[:count], data.draw(st.sampled_from("ABCDEFGH"[:count]))
    options = [text.upper() for text in texts[:count]] if data.draw(st.booleans()) else texts[:count]
    form = data.draw(st.sampled_from(FORMS))
    assert read_letter(form.format(letter), letters, options).letter == letter
    assert read_letter(Letter(letter), letters, options).letter == letter


def test_what_a_reading_tells():
    options = ["cat", "dog", "a red car"]
    assert read_letter("J", "ABCDEFGHIJ").letter == "J"
    assert read_letter("E", "ABCD").letter is None and read_letter("dog", "ABC").letter is None
    assert [read_letter(text, "ABC", options).source for text in (" Dog. ", "B")] == ["option_text", "letter"]
    assert read_letter("A red  car", "ABC", options).letter == "C"
    assert "several letters: A, B" in read_letter("A or B", "ABC", options).reason
    assert "E" in read_letter("The answer is E", "ABC", options).reason


@pytest.mark.parametrize(
    ("text", "letter"),
    [(" B", "B"), ("B) red", "B"), ("Answer: B", "A"), ("answer j", None), ("J", None), ("I", "I"), ("", None)],
)  # fmt: skip
def test_first_capital_is_the_authors_rule(text, letter):
    assert first_capital(text) == letter


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42", "42"), (" New York ", "New York"), (r"<think>so</think><answer>\boxed{42}</answer>", "42"),
        (r"<think>x</think>\boxed{1} and \boxed{2}", "2"), ("<think>a</think><think>b</think> red", "red"),
        ("so it is</think>red", "red"), ("<think>it is red, cut off", ""), ("<answer>cut off", "<answer>cut off"),
        ("<answer>first</answer> then <answer>second</answer>", "second"), (r"\boxed{\{B\}}", r"\{B\}"),
        ("<answer>done</answer><answer>cut off", "done"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\text{North America}}", "North America"), (r"\textbf{\text{B}}", "B"),
        (r"\boxed{open", r"\boxed{open"), (r"\boxed{a \boxed{b} c}", r"a \boxed{b} c"), ("", ""),
    ],
)  # fmt: skip
def test_final_answer(text, answer):
    assert final_answer(text) == answer


STAY = (
    "42", "1.5", "U.S.", "5 p.m.", "Apple Inc.", "...", "It is a fact", "No, thanks", "No, it is not mentioned",
    "1,000", "[1, 2]", "red and blue", "The answer is", "",
)  # fmt: skip
SHORTENED = {
    "42": ["42.", "42 because it is.", "The answer is 42.", "the answer is: 42", "The answer is 42, because it is.",
           "The answer is 42 because the bar ends there.", "The answer is 42.\nThe bar ends there."],
    "Paris": ['"Paris".', "Paris. That is what it says.", ": Paris", "So the final answer is Paris.", "Answer: Paris",
              "**Answer:** Paris.", "The answer is **Paris**.", 'The answer is "Paris".'],
    "Yes": ["Yes.", "**Yes.**", "Yes, it is."], "No": ["No.", "No, it is not.", "No, there are fewer."],
    "blue": ["It is blue.", "It's blue.", "They are blue."], "25%": ["25%."], "USA": ["USA."], "-5": ["-5."],
    "closed": ["closed\n\nIt says so."], "U.K.": ["U.K.."], "1.5": ["The answer is 1.5."],
    "4": ["Two and two. The answer is 4. That is all."], "the U.S. Army": ["The answer is the U.S. Army."],
    r"25\%": [r"So \boxed{25\%}."], "St. Louis": ["The answer is St. Louis."],
}  # fmt: skip


def test_short_answer_takes_the_frame_off_and_guesses_nothing():
    wanted = dict.fromkeys(STAY) | {text: answer for answer, texts in SHORTENED.items() for text in texts}
    assert {text: short_answer(text) for text in wanted} == {text: answer or text for text, answer in wanted.items()}


@given(st.text(max_size=60) | st.text(alphabet="\\boxed{}answer<>/think ABC.,()isnot text", max_size=80))
@settings(max_examples=100, deadline=None)
def test_any_text_gives_a_known_letter_or_none(text):
    assert (read_letter(text, "ABCD", ["a", "red", "", "A b"]).letter or "A") in "ABCD"
    assert (first_capital(text) or "A") in "ABCDEFGHI"
    assert final_answer(text) == final_answer(text).strip()
    assert len(short_answer(text)) <= len(text)


@pytest.mark.parametrize("loop", ["\\boxed{", "B ", "the answer is ", "A, B or ", "not A is ", "B) - "])
def test_a_completion_stuck_in_a_loop_is_read_in_linear_time(loop):
    start = time.process_time()
    read_letter(loop * 1000, "ABCD", ["red", "blue", "green", "black"])
    short_answer(loop * 1000)
    assert time.process_time() - start < 1


def test_json_lines_end_at_line_feeds_alone(tmp_path):
    file, texts = tmp_path / "rows.jsonl", ["a\u2028b", "c\u0085d", "e\x0bf\x0cg"]
    file.write_bytes(("\ufeff" + "\r\n\n".join(json.dumps(t, ensure_ascii=False) for t in texts)).encode())
    found = [(number, json.loads(line)) for number, line in text_lines(file)]
    assert found == list(zip((1, 3, 5), texts, strict=True))
