"""What counts as a loop, and what does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caprl_utils.captions.loops import is_loop

CAPTION = (
    "The chart shows the sales of four cities. Rome has 42, Oslo 17, Lima 30 and Cairo 12. The title is blue. "
    "The bars are green, and a legend stands on the right."
)


@pytest.mark.parametrize(
    "text",
    [
        CAPTION + " The title is blue." * 12,
        CAPTION + " and the tree and the tree and the tree and the tree and the tree and the tr" * 2,
        "ha" * 200,
        "一个红色的圆。" * 20,
        CAPTION + "\n- a red car on the road" * 30 + "\n- a red c",
        " ".join(f"The value of the {n}th bar is 4. The title of it is blue." for n in range(6)),
    ],
)
def test_a_loop(text):
    assert is_loop(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "a", CAPTION, "no no no no", "Left: yes.\nRight: yes.\nTop: yes.\nBottom: yes.\nBack: yes.",
        "| city | sales |\n| --- | --- |\n| Rome | 42 |\n| Oslo | 42 |\n| Lima | 42 |\n| Cairo | 42 |",
        "Row 1: red, red, red, red.\nRow 2: blue, blue, blue, blue.\nRow 3: red, green, red, green.",
    ],
)  # fmt: skip
def test_no_loop(text):
    assert not is_loop(text)


@given(st.text(min_size=1, max_size=40).filter(str.strip), st.integers(70, 100))
def test_whatever_is_said_seventy_times_is_a_loop(phrase, times):
    assert is_loop(CAPTION + phrase * times)


@given(st.text(max_size=59))
def test_a_short_text_never_is(text):
    assert not is_loop(text)
