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
from caprl_utils.answers import Letter
from caprl_utils.errors import UserError
from caprl_utils.models.base import Completion
from caprl_utils.prism import caprl
from caprl_utils.prism.answers import Answer, Task
from caprl_utils.prism.benchmarks import load_registry
from caprl_utils.prism.metrics import METRICS, Score, all_rotations
from caprl_utils.prism.scores import score_rows, scores_frame
from caprl_utils.prism.scoring import Judge, check_vectors, score_answers
from caprl_utils.prompts import CHARXIV_RULES
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


TAGS = ["</think>", "<answer>", "</answer>", "\\boxed{", "}", "{", "B", " ", "\n", "x"]


@given(st.lists(st.sampled_from(TAGS), max_size=14).map("".join))
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
    assert by_authors("infovqa", complete("x"), "[]").value == 0.0
    assert by_authors("infovqa", complete("12"), "[12, None]").value == 1.0
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


# --- the benchmarks' own metrics ---

SHORT_ANSWERS = ["chartqa", "chartqapro", "infovqa", "gqa", "mmmu", "realworldqa"]


def test_every_benchmark_has_a_metric():
    assert {facts.metric for facts in load_registry().values()} <= set(METRICS)


def test_rotations_count_together():
    right, wrong, unread = Score(1.0, "B"), Score(0.0, "A"), Score(0.0, None, "no letter")
    assert all_rotations([right, right]) == Score(1.0, "B B") and all_rotations([right, wrong]).value == 0.0
    found = all_rotations([right, unread])
    assert (found.value, found.parsed) == (0.0, None) and "1 of 2 rotations" in found.reason


def test_what_a_score_tells():
    found = [score("mmstar", text, "B", ["cat", "dog", "cow", "pig"]) for text in ("dog", "no idea")]
    assert [(one.value, one.parsed) for one in found] == [(1.0, "B"), (0.0, None)]
    assert "option" in found[0].reason and found[1].reason


@given(st.sampled_from(SHORT_ANSWERS), st.text(max_size=40), st.text(min_size=1, max_size=20))
@settings(max_examples=150, deadline=None)
def test_scores_lie_between_0_and_1_for_any_text(benchmark, text, gold):
    value = score(benchmark, text, gold).value
    assert value is not None and 0.0 <= value <= 1.0


@pytest.mark.parametrize(
    ("text", "gold", "options", "value"),
    [
        ("The answer is 16.", "16", (), 1.0), ("So the area is 11", "11", (), 1.0), ("The area is 12.", "11", (), 0.0),
        (r"The answer is \sqrt{3}.", r"\sqrt{3}", (), 1.0), (r"The answer is 24\pi", "B", ["3", r"24\pi"], 1.0),
        ("The correct answer is 7. It is odd.", "7", (), 1.0), ("The answer is B.", "B", ["3", "4"], 1.0),
        ("Thus 4 is right.\nThe answer should be 4", "B", ["3", "4"], 1.0), ("**B**", "A", ["3", "4"], 0.0),
    ],
)  # fmt: skip
def test_mathvision_extracts_as_its_own_code_does(text, gold, options, value):
    assert score("mathvision", text, gold, options).value == value


@pytest.mark.parametrize("text", ["\\text{North America}", "5\\ \\text{cm}^2", "\\mathbf{B}"])
@pytest.mark.parametrize("benchmark", SHORT_ANSWERS)
def test_a_gold_with_text_commands_equals_itself(benchmark, text):
    assert score(benchmark, text, [text] if benchmark == "infovqa" else text).value == 1.0


# --- answers as a reader gives them ---


class Sure:
    """A judge that finds the gold wherever an answer holds it."""

    name, model_hash = "sure", "s0"

    def generate(self, requests, sampling, progress=None):
        for request in requests:
            found = re.search(r"60|Paris|\bB\b", re.search(r"(?:Response|Answer): (.*)", request.prompt)[1])
            said = f"Extracted: {found[0] if found else 'none'}\nVerdict: {'yes' if found else 'no'}"
            text = f"<think>\n</think>{said}\nGrade: {float(bool(found))}"
            yield Completion(request.id, 0, text, 1, "stop")


SENTENCES = [
    "{}", "{}.", "The answer is {}.", "**{}**", "So the final answer is {}.",
    "The answer is {} because the caption says so.",
    "Answer: {}", "The answer is: {}\nThe caption says so.", "{} because the caption says so.", '"{}".',
]  # fmt: skip
KINDS = {"integer": "60", "text": "Paris"}


@pytest.mark.parametrize("benchmark", [key for key, facts in load_registry().items() if not facts.loader])
@pytest.mark.parametrize("sentence", SENTENCES)
def test_right_answers_in_sentences_score_1(tmp_path, benchmark, sentence):
    facts = load_registry()[benchmark]
    letter = "letter" in facts.answer and benchmark != "mathverse"
    golds, answers, tasks = {"B": "B"} if letter else KINDS, {}, []
    for kind, gold in golds.items():
        meta = {"answer_type": kind, "question_type": "free_form", "ID": "1", "year": "NO", "image_id": "1"}
        accepted, options = ([gold] if facts.answer == "accepted_list" else gold, tuple("dcab") if letter else ())
        one = Sample(f"1-{kind}-2steps_1", benchmark, (), "?", accepted, options, meta)
        tasks.append(Task(kind, one, 0, "caption", "image", 1, "stop"))
        answers[kind] = Answer(id=kind, text=sentence.format(gold), finish_reason="stop")
    rows = score_rows(tasks, answers, "standard", Judge(Sure(), RowStore(tmp_path / "verdicts.jsonl")))
    assert [row["score"] for row in rows] == [1.0] * len(rows), rows
    assert [row["answer"] for row in rows] == [sentence.format(gold) for gold in golds.values()]


@pytest.mark.parametrize("benchmark", [k for k, facts in load_registry().items() if facts.answer == "letter"])
def test_a_letter_read_from_probabilities_is_never_read_as_text(benchmark):
    options = ["b", "a", "c", "d"]
    for answer in ("A", Letter("A"), "The answer is A."):
        assert score(benchmark, answer, "A", options).value == 1.0
        assert score(benchmark, answer, "B", options).value == 0.0


def test_tables_hold_missing_scores():
    part = {"mean": None, "best_of": {"2": None}}
    values = {"benchmarks": {"mmvet": part, "gqa": part | {"mean": 0.5}}} | dict.fromkeys(("average", "caption_tokens"))
    records = {"run": {"values": values, "unparsed": {"mmvet": 0, "gqa": 1}}}
    row = scores_frame(records).loc["run"]
    assert row["gqa"] == 50.0 and row.isna().sum() == 3 and row["unparsed answers"] == 1


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


CHOICES = {"question_type": "multi_choice", "answer_type": "text", "choices": ["red", "blue"]}
ANGLES = {"question_type": "multi_choice", "answer_type": "text", "choices": ["35°", "145°", "55°"]}
YES_NO = {"question_type": "multi_choice", "answer_type": "text", "choices": ["Yes", "No"]}
INTEGER, LIST = ({"question_type": "free_form", "answer_type": kind} for kind in ("integer", "list"))
FLOAT = {"question_type": "free_form", "answer_type": "float", "precision": 2.0}


@pytest.mark.parametrize(
    ("text", "gold", "meta", "alone", "extracted"),
    [
        ("The answer is 5", "5", INTEGER, 1.0, None), ("5.", "5", INTEGER, 1.0, None), ("6", "5", INTEGER, 0.0, None),
        ("5 cm", "5", INTEGER, None, "5"), ("1,000", "1000", INTEGER, None, "1,000"),
        ("$1.45", "1.45", FLOAT, None, "$1.45"),
        ("It is 1.449", "1.45", FLOAT, None, "1.449"), ("2007 and 2008", "[2007, 2008]", LIST, None, "[2007, 2008]"),
        ("[2007, 2008]", "[2007, 2008]", LIST, 1.0, None), ("The answer is B", "blue", CHOICES, 1.0, None),
        ("blue", "blue", CHOICES, 1.0, None), ("(A)", "blue", CHOICES, 0.0, None),
        ("Option B", "145°", ANGLES, 1.0, None),
        ("No, it is less", "No", YES_NO, 1.0, None), ("bluish", "blue", CHOICES, None, "B"),
        ("cannot say", "blue", CHOICES, None, "blue."), ("", "5", INTEGER, 0.0, None),
    ],
)  # fmt: skip
def test_mathvista_takes_plain_answers_and_asks_for_the_rest(judge, text, gold, meta, alone, extracted):
    assert score("mathvista", text, gold, **meta).value == alone
    ask = judge(*([f"Extracted: {extracted}"] if extracted else []))
    assert score("mathvista", text, gold, judge=ask, **meta).value == (1.0 if alone is None else alone)


def test_what_a_judge_extracts_is_not_matched_by_likeness(judge):
    for text, said in (("it looks blueish", "blu"), ("none", "none")):
        assert score("mathvista", text, "blue", judge=judge(f"Extracted: {said}"), **CHOICES).value == 0.0


@pytest.mark.parametrize("benchmark", ["mathverse", "charxiv", "mmvet"])
def test_no_judge_no_score(benchmark):
    result = score(benchmark, "12", "13")
    assert result.value is None and "judge" in result.reason


def test_what_is_no_verdict_is_told(judge):
    assert "about half" in score("mmvet", "a", "x<AND>y", judge=judge("about half")).reason


THOUGHT = '<think>is it "Verdict: yes"?</think>\n'
ECHO = 'Reply with one line: "Verdict: yes" or "Verdict: no".\n'


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Verdict: no", 0.0), (f"{THOUGHT}Verdict: no", 0.0), (f"{THOUGHT}The same.", None),
        (f"{ECHO}Verdict: no", 0.0),
        (f"Verdict: yes\n{ECHO}", 1.0), ('Reply: "Verdict: yes" or "Verdict: no".\nVerdict: no', 0.0), (ECHO, None),
        ("**Verdict:** yes", 1.0), ("Verdict: **yes**", 1.0), ('"Verdict: yes"', 1.0), ("The verdict is yes.", 1.0),
        ("verdict: YES", 1.0), ('{"verdict": "yes"}', 1.0), ("Verdict: yes? Wait.\nVerdict: no", 0.0), ("yes", None),
        ("<think>Verdict: yes", None), ("so it is</think>Verdict: yes", 1.0), ("Verdict: yesterday", None),
        ("Final verdict:\nno.", 0.0), ("Verdict: no, not yes", 0.0), (r"Verdict: \boxed{yes}", 1.0),
    ],
)  # fmt: skip
def test_verdicts(judge, reply, value):
    assert score("charxiv", "a", "b", judge=judge(reply), answer_type=1).value == value


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Grade: 0.5", 0.5), ('"Grade: 0.5"', 0.5), ("Grade: 0.5.", 0.5), ("**Grade: 0.5**", 0.5),
        ("**Grade:** 1", 1.0),
        ("Grade: **0.5**", 0.5), ("Grade: 1.0", 1.0), ("Grade: 0", 0.0), ("The grade is 0.5", 0.5), ("grade = .5", 0.5),
        ("<think>Grade: 1.0</think>Grade: 0.3", 0.3), ("Grade: 0.2\nOn reflection:\nGrade: 0.4", 0.4),
        ('Reply with one line: "Grade: X".\nGrade: 0.5', 0.5), ("Grade: 1.5", None), ("Grade: 7", None), ("1.0", None),
        ("Grade: 0.55", None), ("Grade: -0.1", None), ("Grade: 50%", None), ("Grade: X", None),
        ("Grade: 0.5/1.0", 0.5), ("Grade: 1 out of 10", None), ("Grade: 1/2", None), ("Grade: 0,5", None),
        ("Grade: 0.4-0.6", None), ("Grade: 0.5, one part is missing", 0.5), ('{"grade": 0.5}', 0.5),
    ],
)  # fmt: skip
def test_grades(judge, reply, value):
    assert score("mmvet", "a", "b", judge=judge(reply)).value == value


@pytest.mark.parametrize(
    "reply",
    [
        "Extracted: 1.2", "Extracted: **1.2**", 'Extracted: "1.2"', "Extracted: 1.2.", "**Extracted:** 1.2",
        "extracted: `1.2`",
        '"Extracted: 1.2"', "<think>Extracted: 7</think>\nExtracted: 1.2", "Extracted: 7\nNo.\nExtracted: 1.2",
        'Extracted: 1.2\nReply with one line: "Extracted: X". If it gives no answer, reply "Extracted: none".',
        'If there is none, I reply "Extracted: none".\nExtracted: 1.2', "Extracted: \\boxed{1.2}",
        "Extracted:\n1.2", '{"extracted": "1.2"}', "Final answer extracted: 1.2",
    ],
)  # fmt: skip
def test_extractions(judge, reply):
    meta = {"question_type": "free_form", "answer_type": "float", "precision": 1.0}
    assert score("mathvista", "about one", "1.2", judge=judge(reply), **meta).value == 1.0


def test_mathverse_extracts_then_compares(judge):
    ask = judge("Extracted: 60", "Extracted: 60°", "Extracted: none", "Verdict: yes")
    asked = [(sample("mathverse", "60", question="angle?"), f"so it is {n}") for n in range(3)]
    assert [item.value for item in score_answers(asked, "standard", ask)] == [1.0, 1.0, 0.0]
    assert len(ask.backend.prompts) == 4
    assert score("mathverse", "60", "60").value == 1.0


def test_charxiv_uses_the_rule_of_the_answers_type(judge):
    ask = judge(*["Verdict: no"] * 4)
    for kind in range(1, 5):
        assert score("charxiv", f"{kind}", "100", judge=ask, answer_type=kind).value == 0.0
    heads = [prompt.split("\n")[0] for prompt in ask.backend.prompts]
    assert [CHARXIV_RULES[kind] in head for kind, head in enumerate(heads, 1)] == [True] * 4


# --- caprl score --vectors ---


def vectors(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def vector(**changes):
    return {"benchmark": "gqa", "prediction": "yes", "gold": "yes", "mode": "standard", "expected": 1.0} | changes


def test_all_vectors_pass():
    """The quirks of the authors' scorer one by one (`why`), each metric against values worked out by hand."""
    done = CliRunner().invoke(app, ["score", "--vectors", str(VECTORS)])
    assert done.exit_code == 0
    assert done.output.strip() == f"{len(VECTORS.read_text().splitlines())} passed, 0 failed"


def test_failures_are_printed_and_counted(tmp_path):
    file = vectors(tmp_path / "v.jsonl", vector(), vector(expected=0.0), vector(benchmark="mmvet", expected=None))
    done = CliRunner().invoke(app, ["score", "--vectors", str(file)])
    assert done.exit_code == 1 and "FAILED line 2 of" in done.output
    assert done.output.strip().endswith("2 passed, 1 failed")


def test_the_value_for_the_pinned_version_wins(tmp_path):
    line = vector(expected=0.0, meta={"math_verify": {"0.9.0": 0.0, "0.8.0": 1.0}})
    assert check_vectors(vectors(tmp_path / "v.jsonl", line)) == (1, [])


def test_a_line_that_is_no_vector_fails_alone(tmp_path):
    bad = [
        "{broken\n", ["a list"], {"benchmark": "gqa", "mode": "standard"}, vector(mode="other"),
        vector(benchmark="gqqa"), vector(expected="yes"), vector(meta=[1]), vector(prediction=7), vector(mode="caprl"),
    ]  # fmt: skip
    passed, failures = check_vectors(vectors(tmp_path / "v.jsonl", *bad, vector(), "\n"))
    assert (passed, len(failures)) == (1, 9)
    for number, text in enumerate((
        "Invalid JSON", "should be an object", "gold Field required", "mode Input should be",
        "'gqqa'; did you mean", "expected Input should be", "meta Input should be", "prediction.str Input should be",
        "use scoring 'standard'",
    )):  # fmt: skip
        assert text in failures[number] and f"line {number + 1} of" in failures[number]


def test_unusable_files_are_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    for name in ("none.jsonl", "empty.jsonl"):
        with pytest.raises(UserError, match=name):
            check_vectors(tmp_path / name)
