"""Scoring: quirks of the authors' scorer, each metric against values worked out by hand, judges."""

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from caprl_utils.__main__ import app
from caprl_utils.answers import Letter
from caprl_utils.errors import UserError
from caprl_utils.prism import metrics
from caprl_utils.prism.benchmarks import load_registry
from caprl_utils.prism.metrics import Score, all_rotations
from caprl_utils.prism.score import check_vectors
from caprl_utils.prism.scores import Judge, score_answers
from caprl_utils.prompts import CHARXIV_RULES
from caprl_utils.records import Sample
from caprl_utils.runs import RowStore
from tests.scripted import Says

DATA = Path(__file__).parents[1] / "data"
VECTORS = DATA / "scoring-vectors.jsonl"
REPLIES = [json.loads(line) for line in (DATA / "judge-replies.jsonl").read_text().splitlines()]


def sample(benchmark, gold, options=(), question="", **meta):
    return Sample("s", benchmark, (), question, gold, tuple(options), meta)


def score(benchmark, text, gold, options=(), judge=None, **meta):
    return score_answers([(sample(benchmark, gold, options, **meta), text)], "standard", judge)[0]


def by_authors(benchmark, answer, gold):
    text = f"<think>reasoning</think>\n<answer>\\boxed{{{answer}}}</answer>"
    return score_answers([(sample(benchmark, gold), text)], "caprl")[0]


# --- the authors' scorer ---

TAGS = ["</think>", "<answer>", "</answer>", "\\boxed{", "}", "{", "B", " ", "\n", "x"]


@given(st.lists(st.sampled_from(TAGS), max_size=14).map("".join))
@example("</think><answer>\\boxed{}</answer>")
@settings(max_examples=100, deadline=None)
def test_extraction_is_the_greedy_pattern(text):
    pattern = re.compile(r"</think>\s*<answer>.*?\\boxed\{(.*)\}.*?</answer>", re.DOTALL)
    found = pattern.findall(text)
    assert metrics.extract(text) == (found[-1] if found else None)


def test_reasons_and_limits_of_time(monkeypatch):
    def loop():
        while True:
            pass

    assert score_answers([(sample("mmstar", "B"), "B")], "caprl")[0].reason == metrics.NO_ANSWER
    assert [by_authors("mmstar", "B", gold).reason for gold in ("", "B")] == [metrics.GOLD_UNPARSED, None]
    start = time.process_time()
    assert metrics.extract("</think><answer>" + "\\boxed{1} " * 20_000) is None
    assert time.process_time() - start < 0.5
    monkeypatch.setattr(metrics, "LIMIT_SEC", 0.05)  # of CPU time
    assert metrics._limited(loop, "stopped") == "stopped"
    assert metrics._limited(lambda: time.sleep(0.1), "stopped") is None  # waiting costs nothing


# --- the benchmarks' own metrics ---


def test_what_a_score_tells():
    found = [score("mmstar", text, "B", ["cat", "dog", "cow", "pig"]) for text in ("dog", "no idea")]
    assert [(one.value, one.parsed) for one in found] == [(1.0, "B"), (0.0, None)]
    assert "option" in found[0].reason and found[1].reason
    right, wrong, unread = Score(1.0, "B"), Score(0.0, "A"), Score(0.0, None, "no letter")
    assert all_rotations([right, right]) == Score(1.0, "B B") and all_rotations([right, wrong]).value == 0.0
    assert all_rotations([right, unread]) == Score(0.0, None, "no clear letter in 1 of 2 rotations")


@given(
    st.sampled_from(["chartqa", "chartqapro", "infovqa", "gqa", "mmmu", "realworldqa"]), st.text(max_size=40),
    st.text(min_size=1, max_size=20),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_scores_lie_between_0_and_1_for_any_text(benchmark, text, gold):
    assert 0.0 <= score(benchmark, text, gold).value <= 1.0


@given(st.sampled_from(["chartqa", "infovqa", "mmstar"]), st.text(max_size=30), st.text(max_size=20))
@settings(max_examples=15, deadline=None)
def test_no_text_breaks_the_authors_scorer(benchmark, answer, gold):
    assert 0.0 <= by_authors(benchmark, answer, gold).value <= 1.0


@pytest.mark.parametrize("answer", ["A", Letter("A"), "The answer is A."])
def test_a_letter_is_a_letter_whatever_the_options_are_called(answer):
    for benchmark in (key for key, facts in load_registry().items() if facts.answer == "letter"):
        assert [score(benchmark, answer, gold, ["b", "a", "c", "d"]).value for gold in "AB"] == [1.0, 0.0]


# --- judges ---


class Replies(Says):
    """Gives the replies that it was made with, and keeps the prompts."""

    def __init__(self, *texts):
        left, self.prompts = [*texts], []
        super().__init__(lambda request: left.pop(0))

    def generate(self, requests, sampling, progress=None):
        assert sampling.temperature == 0.0
        self.prompts += [request.prompt for request in requests]
        return super().generate(requests, sampling)


@pytest.fixture
def judge(tmp_path):
    return lambda *texts: Judge(Replies(*texts), RowStore(tmp_path / "verdicts.jsonl"))


@pytest.mark.parametrize("case", REPLIES, ids=lambda case: f"{case['benchmark']}-{case['text']}-{case['reply']}")
def test_what_is_plain_needs_no_judge_and_a_judges_reply_is_read_or_told(judge, case):
    """reply: None where none is asked for. value: None for no score, which says why."""
    asked = judge(*([case["reply"]] if case["reply"] else []))
    lacking = case["reply"] is case["value"] is None
    found = score(case["benchmark"], case["text"], case["gold"], judge=None if lacking else asked, **case["meta"])
    assert found.value == case["value"]
    assert found.value is not None or "judge" in found.reason
    assert case["reply"] != "about half" or "about half" in found.reason


def test_mathverse_extracts_then_compares_and_charxiv_uses_the_rule_of_the_answers_type(judge):
    ask = judge("Extracted: 60", "Extracted: 60°", "Extracted: none", "Verdict: yes", *["Verdict: no"] * 4)
    asked = [(sample("mathverse", "60", question="angle?"), f"so it is {n}") for n in range(3)]
    assert [item.value for item in score_answers(asked, "standard", ask)] == [1.0, 1.0, 0.0]
    assert score("mathverse", "60", "60").value == 1.0
    for kind in range(1, 5):
        assert score("charxiv", f"{kind}", "100", judge=ask, answer_type=kind).value == 0.0
    heads = [prompt.split("\n")[0] for prompt in ask.backend.prompts]
    assert [CHARXIV_RULES[kind] in head for kind, head in enumerate(heads[4:], 1)] == [True] * 4


# --- caprl score --vectors ---


def test_all_vectors_pass():
    """The quirks of the authors' scorer one by one (`why`), each metric against values worked out by hand."""
    done = CliRunner().invoke(app, ["score", "--vectors", str(VECTORS)])
    assert done.exit_code == 0
    assert done.output.strip() == f"{len(VECTORS.read_text().splitlines())} passed, 0 failed"


def vector(**changes):
    return {"benchmark": "gqa", "prediction": "yes", "gold": "yes", "mode": "standard", "expected": 1.0} | changes


BAD = {  # what is told of a line that does not pass, and the line
    "Invalid JSON": "{broken", "should be an object": ["a list"], "expected 0.0, got 1.0": vector(expected=0.0),
    "gold Field required": {"benchmark": "gqa", "mode": "standard"}, "mode Input should be": vector(mode="other"),
    "'gqqa'; did you mean": vector(benchmark="gqqa"), "expected Input should be": vector(expected="yes"),
    "meta Input should be": vector(meta=[1]), "prediction.str Input should be": vector(prediction=7),
    "use scoring 'standard'": vector(mode="caprl"),
    "not enough values": vector(benchmark="mathvista", prediction=[], gold=[]),
}  # fmt: skip


def test_a_line_that_does_not_pass_fails_alone_and_is_told(tmp_path):
    file, pinned = tmp_path / "v.jsonl", {"math_verify": {"0.9.0": 0.0, "0.8.0": 1.0}}
    good = [vector(), vector(benchmark="mmvet", expected=None), vector(expected=0.0, meta=pinned), ""]
    lines = [line if isinstance(line, str) else json.dumps(line) for line in (*BAD.values(), *good)]
    file.write_text("\n".join(lines))
    done = CliRunner().invoke(app, ["score", "--vectors", str(file)])
    *failures, last = done.output.strip().splitlines()
    assert done.exit_code == 1 and last == f"3 passed, {len(BAD)} failed"
    for number, (told, line) in enumerate(zip(BAD, failures, strict=True), 1):
        assert line.startswith(f"FAILED line {number} of") and told in line
    file.write_text("")
    for name in ("none.jsonl", "v.jsonl"):
        with pytest.raises(UserError, match=name):
            check_vectors(tmp_path / name)
