"""Mode standard: each metric against values computed by hand, and the judges' contracts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caprl_utils.errors import UserError
from caprl_utils.prism.benchmarks import load_registry
from caprl_utils.prism.scoring import Row, Score, score, score_batch, summarise
from caprl_utils.prism.scoring.caprl import GOLD_UNPARSED
from caprl_utils.prism.scoring.choices import wemath_four_dimensional
from caprl_utils.prism.scoring.judge import judge_rows
from caprl_utils.prism.scoring.standard import METRICS
from caprl_utils.prism.scoring.text import vqa_accuracy

CHOICES = {"options": ["cat", "dog", "cow", "pig"]}
FACTOID = {"question_type": "Factoid", "year": ["NO"]}
OPEN = {"question_type": "open"}

CASES = [
    # relaxed accuracy
    ("chartqa", "95", "100", {}, 1.0),
    ("chartqa", "1.05", "1", {}, 0.0),
    ("chartqa", "0.36", "35%", {}, 1.0),
    ("chartqa", "0", "0", {}, 1.0),
    ("chartqa", "$30", "30", {}, 0.0),
    ("chartqa", "YES", "Yes", {}, 1.0),
    ("chartqa", "nan", "5", {}, 0.0),
    ("chartqa", "<think>x</think><answer>\\boxed{\\text{12.5}}</answer>", "12.5", {}, 1.0),
    ("chartqa", "12", [12, 45], {}, 1.0),
    ("mini-chart", "41", "40", {}, 1.0),
    # ChartQAPro
    ("chartqapro", "5", "0", FACTOID, 0.0),
    ("chartqapro", "0.0", "0", FACTOID, 1.0),
    ("chartqapro", "12.", "12", FACTOID, 1.0),
    ("chartqapro", "abc", "abcdef", FACTOID, 0.0),
    ("chartqapro", "['Yes', 'No']", "[Yes, No]", FACTOID, 1.0),
    ("chartqapro", "['12', '45', '7']", "[12, 45]", FACTOID, 2 / 3),
    ("chartqapro", "[2015, 2016]", "[2015, 2017]", {"year": ["YES"]}, 0.5),
    ("chartqapro", "[2015, 41]", "[2015, 40]", {"year": ["YES", "NO"]}, 1.0),
    ("chartqapro", "15", ["9", "14.5"], {"question_type": "Conversational", "year": ["YES", "NO"]}, 1.0),
    ("chartqapro", "unanswered", "unanswerable", {"question_type": "Multi Choice", "year": ["NO"]}, 2 / 3),
    # ANLS
    ("infovqa", "abcd", ["abcdefgh"], {}, 0.5),
    ("infovqa", "strabe", ["straße"], {}, 6 / 7),
    ("infovqa", "NORTH  america", ["North America"], {}, 1.0),
    ("docvqa", "x", ["y", "x"], {}, 1.0),
    ("infovqa", "north amercia", "North America", {}, 11 / 13),
    # letters
    ("mmstar", "The correct option is (C).", "C", CHOICES, 1.0),
    ("mmstar", "C or D", "C", CHOICES, 0.0),
    ("ai2d", "B", "1", CHOICES, 1.0),
    ("mme_realworld", "(E) none", "E", {}, 1.0),
    ("seed2k", "E", "A", {}, 0.0),
    ("mmmu_pro", "\\boxed{J}", "J", {"options": list("abcdefghij")}, 1.0),
    ("mini-scene", "B) red", "B", {"options": ["blue", "red"]}, 1.0),
    ("captionqa", "The answer is E", "E", {"options": list("vwxyz")}, 1.0),
    # RealWorldQA
    ("realworldqa", "Two.", "two", {}, 1.0),
    ("realworldqa", "The answer is C.", "C", {}, 1.0),
    # MMBench
    ("mmbench", ["B", "C", "D", "B"], ["B", "C", "D", "A"], {"group": "circular", **CHOICES}, 0.0),
    # MMMU
    ("mmmu", "(A) is wrong, the answer is (B)", "B", CHOICES, 1.0),
    ("mmmu", "I would say it is the dog here", "B", CHOICES, 1.0),
    ("mmmu", "no idea", "A", CHOICES, 0.0),
    ("mmmu", "The result is 1,234.567", "1234.57", OPEN, 1.0),
    ("mmmu", "the speed is 12.344 m/s", "12.34", OPEN, 1.0),
    ("mmmu", "it is c", "c", OPEN, 1.0),
    ("mmmu", "it is cat", "c", OPEN, 0.0),
    ("mmmu", "24/7", "['24/7', '3.429']", OPEN, 1.0),
    # MATH-Vision
    ("mathvision", "\\boxed{5.004}", "5", {}, 1.0),
    ("mathvision", "\\boxed{17.32}", "10\\sqrt{3}", {}, 0.0),
    ("mathvision", "\\boxed{10\\sqrt{3}}", "10\\sqrt{3}", {}, 1.0),
    ("mathvision", "\\boxed{(1, 2.001)}", "(1,2)", {}, 1.0),
    ("mathvision", "\\boxed{(2,1)}", "(1,2)", {}, 0.0),
    ("mathvision", "\\boxed{x=5}", "5", {}, 1.0),
    ("mathvision", "B", "B", {"options": ["3", "4"]}, 1.0),
    ("mathvision", "\\boxed{4}", "B", {"options": ["3", "4"]}, 1.0),
    ("mathvision", "3/4", "0.75", {}, 1.0),
    # MathVista
    ("mathvista", "isoscele", "isosceles", {"question_type": "multi_choice", "answer_type": "text",
                                            "choices": ["scalene", "isosceles"]}, 1.0),
    ("mathvista", "3.9", "3", {"question_type": "free_form", "answer_type": "integer"}, 1.0),
    ("mathvista", "1.44", "1.4", {"answer_type": "float", "precision": 1.0}, 1.0),
    ("mathvista", "[1, 2]", "[1, 2]", {"question_type": "free_form", "answer_type": "list"}, 1.0),
    # GQA
    ("gqa", "t-shirt.", "tshirt", {}, 1.0),
    ("wemath", "G", "G", {"options": list("abcdefg")}, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("benchmark", "prediction", "gold", "meta", "expected"), CASES)
def test_metrics(benchmark, prediction, gold, meta, expected):
    assert score(benchmark, prediction, gold, "standard", meta).value == pytest.approx(expected, abs=1e-6)


def test_every_benchmark_has_a_metric():
    assert {facts.metric for facts in load_registry().values()} <= set(METRICS)


@pytest.mark.parametrize("benchmark", ["mathverse", "charxiv", "mmvet"])
def test_no_judge_no_score(benchmark):
    result = score(benchmark, "12", "13")
    assert result.value is None and "judge" in result.reason


def test_mathvista_needs_a_judge_only_for_sentences():
    meta = {"question_type": "free_form", "answer_type": "integer", "question": "How many?"}
    talk = "There are three cats and four dogs, so seven animals"
    assert score("mathvista", talk, "7", meta=meta).value is None
    assert score("mathvista", talk, "7", meta=meta, judge=Replies("Extracted: 7")).value == 1.0


def test_option_texts_are_told_apart():
    result = score("mmstar", "dog", "B", meta=CHOICES)
    assert result.value == 1.0 and "option" in result.reason


def test_unread_answers_have_a_reason():
    result = score("mmstar", "no idea", "B", meta=CHOICES)
    assert (result.value, result.parsed) == (0.0, None) and result.reason


class Replies:
    """A judge that repeats what it was given and keeps the prompts."""

    name = "replies"

    def __init__(self, *texts):
        self.texts, self.prompts = list(texts), []

    def __call__(self, prompts):
        self.prompts += prompts
        return [self.texts.pop(0) for _ in prompts]


def test_mmvet_grades():
    rows = [Row("mmvet", "a", "x<AND>y", {"question": "q?"})] * 3
    scores = score_batch(rows, "standard", judge=Replies("Grade: 0.5", "about half", None))
    assert [item.value for item in scores] == [0.5, None, None]
    assert "no verdict" in scores[1].reason and "failed" in scores[2].reason


@pytest.mark.parametrize("reply", ["Grade: 1.5", "Grade: 7", "Grade: 0.55", "1.0", "Grade: -0.1"])
def test_grades_out_of_form_are_no_grades(reply):
    assert score("mmvet", "a", "b", meta={"question": "q"}, judge=Replies(reply)).value is None


def test_mathverse_extracts_then_compares():
    judge = Replies("Extracted: 60", "Extracted: 60°", "Extracted: none", "Verdict: yes")
    rows = [Row("mathverse", f"so it is {n}", "60", {"question": "angle?"}) for n in range(3)]
    scores = score_batch(rows, "standard", judge=judge)
    assert [item.value for item in scores] == [1.0, 1.0, 0.0]
    assert len(judge.prompts) == 4
    assert score("mathverse", "60", "60").value == 1.0


def test_charxiv_uses_the_rule_of_the_category():
    judge = Replies("Verdict: no")
    meta = {"question": "which?", "reasoning_q_source": 3}
    assert score("charxiv", "105", "100", meta=meta, judge=judge).value == 0.0
    assert "same number" in judge.prompts[0]
    with pytest.raises(UserError, match="reasoning_q_source"):
        score("charxiv", "105", "100", meta={"question": "which?"}, judge=Replies("Verdict: no"))


def test_a_judge_needs_the_question_and_one_reply_each():
    with pytest.raises(UserError, match=r"meta\.question"):
        score("mmvet", "a", "b", judge=Replies("Grade: 1.0"))

    def short(prompts):
        return []

    short.name = "short"
    with pytest.raises(UserError, match="0 replies for 1 prompts"):
        judge_rows("llm_judge_graded", [Row("mmvet", "a", "b", {"question": "q"})], short)


def test_vqa_accuracy_by_hand():
    golds = ["a cat", "Cat"] + ["dog"] * 8  # two of ten: (2 * 1/3 + 8 * 2/3) / 10
    assert vqa_accuracy("the cat.", golds) == pytest.approx(0.6)
    assert vqa_accuracy("dog", golds) == 1.0
    assert vqa_accuracy("Two", ["2"] * 10) == 1.0
    assert vqa_accuracy("1,000.5", ["1000.5"] * 4) == 1.0
    assert vqa_accuracy("x", []) == 0.0


def test_summaries_count_what_a_mean_hides():
    caprl = [Score(1.0, None, GOLD_UNPARSED), Score(0.0, None), Score(1.0, "B")]
    standard = [Score(0.0, "B"), Score(0.0, "C"), Score(None, "B", "no judge")]
    found = summarise(caprl, standard)
    assert (found.mean, found.unparsed, found.gold_unparsed, found.disagreeing) == (2 / 3, 2, 1, 2)
    assert (summarise(standard).mean, summarise(standard).unscored) == (None, 1)


WEMATH = ["TT-T", "TF-T", "FF-T", "TT-F", "TF-F", "TTT-T", "TFF-T", "FFF-F"]


def wemath_rows(groups):
    for number, group in enumerate(groups):
        steps, multi = group.split("-")
        keys = [f"{len(steps)}steps_{place}" for place in range(1, len(steps) + 1)]
        for key, mark in zip([*keys, f"{len(steps)}steps_multi"], steps + multi, strict=True):
            yield {"ID": number, "key": key, "correct": mark == "T"}


def test_wemath_worked_example():
    result = wemath_four_dimensional(list(wemath_rows(WEMATH)))
    assert (result.inadequate_generalization, result.insufficient_knowledge) == (1, 2)
    assert (result.mastery_strict, result.mastery_loose, result.rote_strict, result.rote_loose) == (
        2,
        4,
        3,
        1,
    )
    assert result.score_strict == pytest.approx(98.95, abs=0.005)
    assert result.score_loose == pytest.approx(99.33, abs=0.005)
    assert result.groups == 8


def test_wemath_refuses_half_a_group():
    rows = [row for row in wemath_rows(["TT-T"]) if not row["key"].endswith("_multi")]
    with pytest.raises(ValueError, match="2steps_1"):
        wemath_four_dimensional(rows)


def test_a_prediction_must_be_text():
    with pytest.raises(UserError, match="must be text"):
        score("gqa", ["a"], "a")


TEXTUAL = [
    "chartqa",
    "chartqapro",
    "infovqa",
    "mmstar",
    "mmmu",
    "realworldqa",
    "mathvision",
    "gqa",
    "mmbench",
]


@given(st.sampled_from(TEXTUAL), st.text(max_size=40), st.text(min_size=1, max_size=20))
@settings(max_examples=150, deadline=None)
def test_scores_lie_between_0_and_1_for_any_text(benchmark, prediction, gold):
    value = score(benchmark, prediction, gold).value
    assert value is not None and 0.0 <= value <= 1.0


@given(st.text(max_size=20), st.text(max_size=20))
@settings(max_examples=80, deadline=None)
def test_similarity_is_symmetric(left, right):
    left, right = (
        left.replace("\\", "").replace("<", "").strip(),
        right.replace("\\", "").replace("<", "").strip(),
    )
    assert score("docvqa", left, [right]).value == pytest.approx(score("docvqa", right, [left]).value)


@pytest.mark.parametrize("text", ["\\text{North America}", "5\\ \\text{cm}^2", "\\mathbf{B}"])
@pytest.mark.parametrize("benchmark", ["chartqa", "chartqapro", "infovqa", "gqa"])
def test_a_gold_with_text_commands_equals_itself(benchmark, text):
    assert score(benchmark, text, [text] if benchmark == "infovqa" else text).value == 1.0
