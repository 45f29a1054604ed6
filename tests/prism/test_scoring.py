"""Scoring: quirks of the authors' scorer, each metric against values worked out by hand, judges, test vectors."""

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from math_verify.errors import TimeoutException
from typer.testing import CliRunner

from caprl_utils.__main__ import app
from caprl_utils.errors import UserError
from caprl_utils.models.base import Completion
from caprl_utils.prism import caprl
from caprl_utils.prism.benchmarks import load_registry
from caprl_utils.prism.metrics import METRICS, Score, all_rotations
from caprl_utils.prism.scoring import Judge, check_vectors, score_answers
from caprl_utils.records import Sample
from caprl_utils.runs import RowStore

VECTORS = Path(__file__).parents[1] / "data" / "scoring-vectors.jsonl"


def sample(benchmark, gold, options=(), question="", **meta):
    return Sample("s", benchmark, (), question, gold, tuple(options), meta)


def score(benchmark, text, gold, options=(), judge=None, **meta):
    return score_answers([(sample(benchmark, gold, options, **meta), text)], "standard", judge)[0]


# --- the authors' scorer ---


def complete(answer: str) -> str:
    return f"<think>reasoning</think>\n<answer>\\boxed{{{answer}}}</answer>"


def by_authors(benchmark, text, gold):
    return score_answers([(sample(benchmark, gold), text)], "caprl")[0]


@pytest.mark.parametrize(
    "completion",
    [
        "\\boxed{B}", "<answer>\\boxed{B}</answer>", "<think>x</think><answer>B</answer>",
        "<think>x</think> so <answer>\\boxed{B}</answer>", "<think>x</think><Answer>\\boxed{B}</Answer>",
        "<think>x</think><answer>\\boxed{B}", "<think>x</think><answer>\\boxed{A} or \\boxed{B}</answer>", "",
    ],
)  # fmt: skip
def test_layouts_that_give_no_answer(completion):
    assert by_authors("mmstar", completion, "B").value == 0.0


def test_reasons():
    assert by_authors("mmstar", "B", "B").reason == caprl.NO_ANSWER
    assert by_authors("mmstar", "B", "").reason == caprl.GOLD_UNPARSED
    assert by_authors("mmstar", complete("B"), "B").reason is None


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
    assert caprl.extract(text) == (found[-1] if found else None)


def test_extraction_of_a_loop_takes_linear_time():
    start = time.process_time()
    assert caprl.extract("</think><answer>" + "\\boxed{1} " * 20_000) is None
    assert time.process_time() - start < 0.5


def test_lists_of_alternatives_that_are_empty_or_hold_no_text():
    assert caprl.chart_score("5", "[]", similarity=True) == 0.0
    assert by_authors("infovqa", complete("x"), "[]").value == 0.0
    assert caprl.chart_score("12", "[12, None]", similarity=True) == 1.0
    assert by_authors("chartqa", complete("45"), [12, 45]).value == 1.0


@given(st.text(max_size=30), st.text(max_size=20), st.sampled_from(["chartqa", "infovqa", "mmstar"]))
@settings(max_examples=15, deadline=None)
def test_no_text_breaks_the_scorer(answer, gold, benchmark):
    value = by_authors(benchmark, complete(answer), gold).value
    assert value is not None and 0.0 <= value <= 1.0


def test_the_time_limit_counts_cpu_time(monkeypatch):
    monkeypatch.setattr(caprl, "LIMIT_SEC", 0.05)
    with pytest.raises(TimeoutException), caprl._cpu_limit():
        while True:
            pass
    start = time.monotonic()
    with caprl._cpu_limit():
        time.sleep(0.1)  # waiting costs nothing
    assert time.monotonic() - start >= 0.1


def test_mistakes_are_named():
    with pytest.raises(UserError, match="chartqa"):
        by_authors("chartqaa", "x", "x")
    with pytest.raises(UserError, match="scoring 'standard'"):
        by_authors("gqa", "x", "x")
    with pytest.raises(UserError, match="must be text"):
        by_authors("chartqa", ["x"], "x")
    with pytest.raises(UserError, match="must be text"):
        score("gqa", ["a"], "a")


# --- the benchmarks' own metrics ---


def test_every_benchmark_has_a_metric():
    assert {facts.metric for facts in load_registry().values()} <= set(METRICS)


def test_rotations_count_together():
    right, wrong, unread = Score(1.0, "B"), Score(0.0, "A"), Score(0.0, None, "no letter")
    assert all_rotations([right, right]) == Score(1.0, "B B") and all_rotations([right, wrong]).value == 0.0
    found = all_rotations([right, unread])
    assert (found.value, found.parsed) == (0.0, None) and "1 of 2 rotations" in found.reason


def test_what_a_score_tells():
    by_option = score("mmstar", "dog", "B", ["cat", "dog", "cow", "pig"])
    assert by_option.value == 1.0 and "option" in by_option.reason
    unread = score("mmstar", "no idea", "B", ["cat", "dog", "cow", "pig"])
    assert (unread.value, unread.parsed) == (0.0, None) and unread.reason


TEXTUAL = "chartqa chartqapro infovqa mmstar mmmu realworldqa mathvision gqa mmbench"


@given(st.sampled_from(TEXTUAL.split()), st.text(max_size=40), st.text(min_size=1, max_size=20))
@settings(max_examples=150, deadline=None)
def test_scores_lie_between_0_and_1_for_any_text(benchmark, text, gold):
    value = score(benchmark, text, gold).value
    assert value is not None and 0.0 <= value <= 1.0


@pytest.mark.parametrize("text", ["\\text{North America}", "5\\ \\text{cm}^2", "\\mathbf{B}"])
@pytest.mark.parametrize("benchmark", ["chartqa", "chartqapro", "infovqa", "gqa"])
def test_a_gold_with_text_commands_equals_itself(benchmark, text):
    assert score(benchmark, text, [text] if benchmark == "infovqa" else text).value == 1.0


# --- judges ---


class Replies:
    """A model that gives the replies it was made with, and keeps the prompts; None: it failed."""

    name = "replies"

    def __init__(self, *texts):
        self.texts, self.prompts = list(texts), []

    def generate(self, requests, sampling, progress=None):
        assert sampling.temperature == 0.0
        self.prompts += [request.prompt for request in requests]
        return [Completion(request.id, 0, self.texts.pop(0), 1, "stop") for request in requests]


@pytest.fixture
def judge(tmp_path):
    def make(*texts):
        return Judge(Replies(*texts), RowStore(tmp_path / "verdicts.jsonl"))

    return make


@pytest.mark.parametrize("benchmark", ["mathverse", "charxiv", "mmvet"])
def test_no_judge_no_score(benchmark):
    result = score(benchmark, "12", "13")
    assert result.value is None and "judge" in result.reason


def test_mathvista_needs_a_judge_only_for_sentences(judge):
    meta = {"question_type": "free_form", "answer_type": "integer", "question": "How many?"}
    talk = "There are three cats and four dogs, so seven animals"
    assert score("mathvista", talk, "7", **meta).value is None
    assert score("mathvista", talk, "7", judge=judge("Extracted: 7"), **meta).value == 1.0


def test_mmvet_grades(judge):
    asked = [(sample("mmvet", "x<AND>y", question=f"q{n}?"), "a") for n in range(2)]
    scores = score_answers(asked, "standard", judge("Grade: 0.5", "about half"))
    assert [item.value for item in scores] == [0.5, None] and "no verdict" in scores[1].reason


@pytest.mark.parametrize("reply", ["Grade: 1.5", "Grade: 7", "Grade: 0.55", "1.0", "Grade: -0.1"])
def test_grades_out_of_form_are_no_grades(reply, judge):
    assert score("mmvet", "a", "b", judge=judge(reply)).value is None


def test_mathverse_extracts_then_compares(judge):
    ask = judge("Extracted: 60", "Extracted: 60°", "Extracted: none", "Verdict: yes")
    asked = [(sample("mathverse", "60", question="angle?"), f"so it is {n}") for n in range(3)]
    assert [item.value for item in score_answers(asked, "standard", ask)] == [1.0, 1.0, 0.0]
    assert len(ask.backend.prompts) == 4
    assert score("mathverse", "60", "60").value == 1.0


def test_charxiv_uses_the_rule_of_the_category(judge):
    ask = judge("Verdict: no")
    assert score("charxiv", "105", "100", judge=ask, answer_type=3).value == 0.0
    assert "same number" in ask.backend.prompts[0]


def test_replies_are_kept_and_only_the_missing_are_asked_again(judge):
    asked = [(sample("mmvet", "b", question=f"q{n}?"), "a") for n in range(4)]
    with pytest.raises(UserError, match="replies failed on 1 of 4 prompts"):
        score_answers(asked, "standard", judge("Grade: 0.5", None, "Grade: 0.5", "Grade: 0.5"))
    again = judge("Grade: 0.1")
    assert [item.value for item in score_answers(asked, "standard", again)] == [0.5, 0.1, 0.5, 0.5]
    assert len(again.backend.prompts) == 1


# --- caprl score --vectors ---


def vectors(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def vector(**changes):
    plain = {"benchmark": "gqa", "prediction": "yes", "gold": "yes", "mode": "standard", "expected": 1.0}
    return plain | changes


def test_all_vectors_pass():
    """The quirks of the authors' scorer one by one (`why`), each metric against values worked out by hand."""
    done = CliRunner().invoke(app, ["score", "--vectors", str(VECTORS)])
    assert done.exit_code == 0
    assert done.output.strip() == f"{len(VECTORS.read_text().splitlines())} passed, 0 failed"


def test_failures_are_printed_and_counted(tmp_path):
    lines = vector(), vector(expected=0.0), vector(benchmark="mmvet", expected=None)
    file = vectors(tmp_path / "v.jsonl", *lines)
    done = CliRunner().invoke(app, ["score", "--vectors", str(file)])
    assert done.exit_code == 1 and "FAILED line 2 of" in done.output
    assert done.output.strip().endswith("2 passed, 1 failed")


def test_the_value_for_the_pinned_version_wins(tmp_path):
    meta = {"math_verify": {"0.9.0": 0.0, "0.8.0": 1.0}}
    assert check_vectors(vectors(tmp_path / "v.jsonl", vector(expected=0.0, meta=meta))) == (1, [])


def test_a_line_that_is_no_vector_fails_alone(tmp_path):
    bad = [
        "{broken\n", ["a list"], {"benchmark": "gqa", "mode": "standard"}, vector(mode="other"),
        vector(benchmark="gqqa"), vector(expected="yes"), vector(meta=[1]), vector(prediction=7), vector(mode="caprl"),
    ]  # fmt: skip
    passed, failures = check_vectors(vectors(tmp_path / "v.jsonl", *bad, vector(), "\n"))
    assert (passed, len(failures)) == (1, 9)
    for number, text in enumerate((
        "Invalid JSON", "should be an object", "gold: Field required; expected: Field", "mode: Input should be",
        "'gqqa': did you mean", "expected: Input should be", "meta: Input should be", "must be text, not int",
        "use scoring 'standard'",
    )):  # fmt: skip
        assert text in failures[number] and f"line {number + 1} of" in failures[number]


def test_unusable_files_are_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    for name in ("none.jsonl", "empty.jsonl"):
        with pytest.raises(UserError, match=name):
            check_vectors(tmp_path / name)


def test_other_math_verify_versions_are_told(monkeypatch):
    assert caprl.version_warning() is None
    monkeypatch.setattr(caprl, "version", lambda name: "0.9.0")
    assert "0.8.0" in caprl.version_warning()
