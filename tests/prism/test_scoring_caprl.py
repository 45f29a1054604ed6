"""Mode caprl: the quirks of the authors' scorer one by one, and the shortcuts against math-verify."""

import re
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from math_verify.errors import TimeoutException

from caprl_utils.errors import UserError
from caprl_utils.prism.scoring import Row, score, score_batch, symbolic, version_record, workers
from caprl_utils.prism.scoring.caprl import (
    GOLD_UNPARSED,
    NO_ANSWER,
    chart_score,
    extract,
    reference_verdict,
)
from caprl_utils.prism.scoring.fast import known_verdict, shape


def complete(answer: str) -> str:
    return f"<think>reasoning</think>\n<answer>\\boxed{{{answer}}}</answer>"


def caprl(benchmark: str, answer: str, gold) -> float | None:
    return score(benchmark, complete(answer), gold, "caprl").value


QUIRKS = [
    ("Q1", "chartqa", "95", "100", 0.0),
    ("Q1", "chartqa", "105.2", "100", 1.0),
    ("Q1", "chartqa", "95.5", "100", 1.0),
    ("Q2", "chartqa", "0.03", "3", 1.0),
    ("Q2", "chartqa", "-300", "-3", 1.0),
    ("Q2", "chartqa", "0.3", "3", 0.0),
    ("Q3", "chartqa", "12.5%", "12.5", 0.0),
    ("Q3", "chartqa", "2,150", "2145", 0.0),
    ("Q4", "chartqa", "0.50", "0.52", 1.0),
    ("Q4", "chartqa", "0.5", "0.5", 1.0),
    ("Q5", "chartqa", "12%", "12", 0.0),
    ("Q6", "chartqa", "0.0", "0", 1.0),
    ("Q6", "chartqa", "0.001", "0", 0.0),
    ("Q7", "mmstar", "B", "   ", 1.0),
    ("Q7", "mathvision", "B", "$$", 1.0),
    ("Q7", "chartqa", "B", "a\nb", 1.0),
    ("Q8", "infovqa", "2015-2020", "2010-2015", 1.0),
    ("Q9", "chartqa", "12 345", "357", 1.0),
    ("Q9", "chartqa", "Mail", "Lima", 1.0),
    ("Q10", "chartqapro", "Blue, Red", "Red and Blue", 1.0),
    ("Q11", "infovqa", "5 kg", "5", 1.0),
    ("Q11", "mathverse", "5 cm", "5", 1.0),
    ("Q12", "infovqa", "us", "US$ 5 million", 1.0),
    ("Q13", "mathverse", "60°", "60", 0.0),
    ("Q14", "chartqa", "\\text{North America}", "North America", 0.0),
    ("Q15", "infovqa", "45", "[12, 45]", 1.0),
    ("Q15", "charxiv", "1200", "[12, 45]", 1.0),
    ("Q15", "mathverse", "12", "[12, 45]", 0.0),
    ("Q16", "chartqa", "3", "exit()", 0.0),
    ("Q17", "infovqa", "255", "250", 1.0),
    ("Q18", "infovqa", "STRABE", "straße", 6 / 7),
    ("Q18", "infovqa", "abc", "abcdefg", 0.0),
    ("Q19", "charxiv", "105", "100", 1.0),
    ("Q20", "mmstar", "(B)", "B", 1.0),
    ("Q20", "mmstar", "B)", "B", 0.0),
    ("Q20", "mmstar", "Option B", "B", 0.0),
    ("Q21", "mmmu_pro", "i", "I", 0.0),
    ("Q22", "mathverse", "1 < x < 3", "(1,3)", 1.0),
    ("Q22", "mathverse", "(1,3)", "1 < x < 3", 0.0),
    ("version", "mathverse", "17.320508", "10\\sqrt{3}", 1.0),
]


@pytest.mark.parametrize(("quirk", "benchmark", "answer", "gold", "expected"), QUIRKS)
def test_quirks(quirk, benchmark, answer, gold, expected):
    assert caprl(benchmark, answer, gold) == pytest.approx(expected, abs=1e-6), quirk


@pytest.mark.parametrize(
    "completion",
    [
        "\\boxed{B}", "<answer>\\boxed{B}</answer>", "<think>x</think><answer>B</answer>",
        "<think>x</think> so <answer>\\boxed{B}</answer>", "<think>x</think><Answer>\\boxed{B}</Answer>",
        "<think>x</think><answer>\\boxed{B}", "<think>x</think><answer>\\boxed{A} or \\boxed{B}</answer>", "",
    ],
)  # fmt: skip
def test_layouts_that_give_no_answer(completion):
    result = score("mmstar", completion, "B", "caprl")
    assert result.value == 0.0


def test_reasons():
    assert score("mmstar", "B", "B", "caprl").reason == NO_ANSWER
    assert score("mmstar", "B", "", "caprl").reason == GOLD_UNPARSED
    assert score("mmstar", complete("B"), "B", "caprl").reason is None


TAGS = st.lists(
    st.sampled_from(["</think>", "<answer>", "</answer>", "\\boxed{", "}", "{", "B", " ", "\n", "x"]),
    max_size=14,
).map("".join)


@given(TAGS)
@example("</think><answer>\\boxed{}</answer>")
@settings(max_examples=150, deadline=None)
def test_extraction_is_the_greedy_pattern(text):
    pattern = re.compile(r"</think>\s*<answer>.*?\\boxed\{(.*)\}.*?</answer>", re.DOTALL)
    found = pattern.findall(text)
    assert extract(text) == (found[-1] if found else None)


def test_extraction_of_a_loop_takes_linear_time():
    start = time.process_time()
    assert extract("</think><answer>" + "\\boxed{1} " * 20_000) is None
    assert time.process_time() - start < 0.5


def test_an_empty_list_of_alternatives_leaves_the_symbolic_score():
    assert chart_score("5", "[]", similarity=True) == 0.0
    assert score("infovqa", complete("x"), "[]", "caprl").value == 0.0


def test_items_of_a_list_gold_that_are_no_text():
    assert chart_score("12", "[12, None]", similarity=True) == 1.0
    assert score("chartqa", complete("45"), [12, 45], "caprl").value == 1.0


PLAIN = [
    "A", "b", "e", "I", "i", "E", "12", "12.0", "012", "-3", "0.5", ".5", "0", "12%", "0.12", "1,000", "1000",
    "1/2", "Male", "meal", "ee", "de", "ed", "date", "Red and Blue", "5 kg", "5 million", "25-34", "-9",
    "St. Louis", "st. louis", "North", "norm", "Zürich", "café", "\\frac{1}{2}", "Yes ", "Q1 2019",
]  # fmt: skip


def test_shortcuts_equal_math_verify_on_a_table():
    """A sample of all pairs here, all of them and generated ones in the integration tier."""
    pairs = [(a, g) for i, a in enumerate(PLAIN) for j, g in enumerate(PLAIN) if (i * 7 + j) % 41 == 0]
    known = {pair: verdict for pair in pairs if (verdict := known_verdict(*pair)) is not None}
    assert len(known) > len(pairs) // 2
    for pair, verdict in known.items():
        assert verdict == reference_verdict(*pair), pair


@pytest.mark.integration
def test_shortcuts_equal_math_verify_on_all_pairs():
    for pair in ((a, g) for a in [*PLAIN, ""] for g in PLAIN):
        verdict = known_verdict(*pair)
        assert verdict is None or verdict == reference_verdict(*pair), pair


WORDS = st.text(alphabet="abdeiIEDnoxyz", min_size=1, max_size=6)
ANSWERS = st.one_of(
    st.sampled_from(PLAIN), WORDS, st.builds("{} {}".format, WORDS, WORDS), st.integers(-50, 3000).map(str),
    st.decimals(-9, 99, places=2).map(str), st.builds("{} {}".format, st.integers(0, 30), WORDS),
    st.text(alphabet="abAB12 .,%-'/", max_size=8),
)  # fmt: skip


@pytest.mark.integration
@given(ANSWERS, ANSWERS)
@settings(max_examples=2000, deadline=None)
def test_shortcuts_equal_math_verify_on_generated_answers(answer, gold):
    verdict = known_verdict(answer, gold)
    assert verdict is None or verdict == reference_verdict(answer, gold)


@pytest.mark.parametrize("text", ["a$b", "a\nb", "\\boxed{3}", "the answer", "a [b] c", "x\\", "", "y" * 101])
def test_texts_of_which_math_verify_may_take_a_part_have_no_shape(text):
    assert shape(text) is None


def test_a_batch_equals_its_rows():
    rows = [Row("infovqa", complete(a), g) for a in PLAIN[:4] for g in PLAIN[:4]]
    batch = score_batch(rows, "caprl")
    assert batch == [score(row.benchmark, row.prediction, row.gold, "caprl") for row in rows]


@given(st.text(max_size=30), st.text(max_size=20), st.sampled_from(["chartqa", "infovqa", "mmstar"]))
@settings(max_examples=15, deadline=None)
def test_no_text_breaks_the_scorer(answer, gold, benchmark):
    value = score(benchmark, complete(answer), gold, "caprl").value
    assert value is not None and 0.0 <= value <= 1.0


@pytest.mark.integration
def test_worker_processes_and_threads_give_the_same():
    pairs = [("1/2", "0.5"), ("meal", "Male"), ("x=5", "5"), ("(1,2)", "(2,1)"), ("5", "a\nb")]
    here = workers.verdicts(pairs, workers=0)
    assert workers.verdicts(pairs, workers=2) == here
    found = []
    thread = threading.Thread(target=lambda: found.append(workers.verdicts(pairs)))
    thread.start()
    thread.join()
    assert found == [here]


@pytest.mark.integration
def test_a_worker_that_hangs_is_killed_and_the_rest_goes_on(monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, sys, time\n"
        "for line in sys.stdin:\n"
        "    if 'hang' in line: time.sleep(60)\n"
        "    print(json.dumps([1.0, 'x', True]), flush=True)\n"
    )
    real = subprocess.Popen
    monkeypatch.setattr(workers, "HARD_LIMIT_SEC", 3.0)
    monkeypatch.setattr(
        workers.subprocess, "Popen", lambda command, **kw: real([sys.executable, str(script)], **kw)
    )
    found = workers.verdicts([("a", "a"), ("hang", "a"), ("b", "b")], workers=1)
    assert [verdict is None for verdict in found] == [False, True, False]


def test_the_time_limit_counts_cpu_time(monkeypatch):
    monkeypatch.setattr(symbolic, "LIMIT_SEC", 0.05)
    with pytest.raises(TimeoutException), symbolic._cpu_limit():
        while True:
            pass
    start = time.monotonic()
    with symbolic._cpu_limit():
        time.sleep(0.1)  # waiting costs nothing
    assert time.monotonic() - start >= 0.1


def test_other_math_verify_versions_are_told(monkeypatch):
    assert version_record()["math_verify_matches"] is True
    symbolic.math_verify_version.cache_clear()
    monkeypatch.setattr(symbolic, "version", lambda name: "0.9.0")
    record = version_record()
    symbolic.math_verify_version.cache_clear()
    assert record["math_verify"] == "0.9.0" and "0.8.0" in record["warning"]


def test_mistakes_are_named():
    with pytest.raises(UserError, match="chartqa"):
        score("chartqaa", "x", "x", "caprl")
    with pytest.raises(UserError, match="mode 'standard'"):
        score("gqa", "x", "x", "caprl")
    with pytest.raises(UserError, match="unknown scoring mode"):
        score("gqa", "x", "x", "both")
    with pytest.raises(UserError, match="as text"):
        score_batch([Row("chartqa", ["x"], "x")], "caprl")
