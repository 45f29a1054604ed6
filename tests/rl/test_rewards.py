import math
from dataclasses import replace

import pytest

from caprl_utils import prompts
from caprl_utils.records import Question
from caprl_utils.rl.rewards import CaptionTask, QASettings, draw_rounds, expected_scores, qa_rewards
from tests.rl.reader_fakes import ChanceReader, options_of

QUESTIONS = [
    Question(question="What is the value of Rome?", options=("17", "42", "5", "8"), answer="B"),
    Question(question="What is the topic?", options=("sales", "rain", "cats", "books"), answer="A"),
    Question(question="Who wrote it?", options=("Ann", "Bob"), answer="B"),
]
EXPECTED = QASettings("qa_expected", rounds=6, draw="stratified", temperature=1.0, min_letter_mass=0.5)
SAMPLED = replace(EXPECTED, kind="qa_sampled")


def task(caption: str = "The value of Rome is 42.", questions=QUESTIONS, index: int = 0) -> CaptionTask:
    return CaptionTask(caption, questions, (0, 1, "image", index))


def knows(chance: float):
    """A reader that finds the right option with a probability of `chance`."""

    def chances(request, options):
        right = {q.question: q.answer_text for q in QUESTIONS}
        gold = next(answer for text, answer in right.items() if text in request.prompt)
        rest = (1 - chance) / (len(options) - 1)
        return {letter: chance if text == gold else rest for letter, text in options.items()}

    return ChanceReader(chances)


def says(text: str):
    """A reader that always picks the option `text`, or the letter when it is one."""
    return ChanceReader(
        lambda request, options: {letter: float(text in (letter, o)) for letter, o in options.items()}
    )


@pytest.mark.parametrize(
    ("reader", "reward"),
    [  # by hand: 6 stratified rounds ask each of the 3 questions twice
        (says("42"), 2 / 6),  # right on Rome only
        (says(prompts.CANNOT_ANSWER), 0.0),  # the extra option is never right
        (knows(1.0), 1.0),
        (knows(0.0), 0.0),
    ],
)
@pytest.mark.parametrize("settings", [EXPECTED, SAMPLED], ids=["expected", "sampled"])
def test_hand_computed(reader, reward, settings):
    assert qa_rewards([task()], reader, settings).rewards == [pytest.approx(reward, abs=1e-9)]


def test_expected_by_hand_at_temperature():
    """Two options and the extra one, p = 0.5, 0.3, 0.2; at T = 0.5 they become p^2, renormalised."""
    reader = ChanceReader(
        lambda r, options: {k: {"Bob": 0.5, "Ann": 0.3}.get(o, 0.2) for k, o in options.items()}
    )
    settings = replace(EXPECTED, rounds=1, temperature=0.5)
    batch = qa_rewards([task(questions=QUESTIONS[2:])], reader, settings)
    assert batch.rewards == [pytest.approx(0.25 / (0.25 + 0.09 + 0.04))]
    assert batch.metrics["letter_mass"] == pytest.approx(1.0)
    assert batch.metrics["cannot_answer"] == pytest.approx(0.04 / 0.38)


def test_expected_is_the_mean_of_many_sampled():
    """Five standard errors of 3,000 draws; each key draws other questions, orders and answers."""
    reader, temperature = knows(0.4), 0.6
    settings = replace(SAMPLED, rounds=1, draw="replacement", temperature=temperature)
    drawn = qa_rewards([task(index=i) for i in range(3000)], reader, settings).rewards
    expected = qa_rewards(
        [task(index=i) for i in range(3000)], reader, replace(settings, kind="qa_expected")
    ).rewards
    mean, p = sum(drawn) / len(drawn), sum(expected) / len(expected)
    assert 0.3 < p < 0.99
    assert abs(mean - p) < 5 * math.sqrt(p * (1 - p) / len(drawn))


@pytest.mark.parametrize("kind", ["qa_expected", "qa_sampled"])
def test_always_a_earns_chance(kind):
    """Shuffling: a reader that always says A is right in a quarter of the questions with four options."""
    settings = QASettings(kind, 1, "replacement", 0.6, 0.5)
    tasks = [task(questions=QUESTIONS[:1], index=i) for i in range(3000)]
    rewards = qa_rewards(tasks, says("A"), settings).rewards
    assert sum(rewards) / len(rewards) == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 3000))


def test_extra_option_is_last_and_each_order_occurs():
    orders = set()
    for index in range(400):
        for r in draw_rounds(task(questions=QUESTIONS[:1], index=index), 1, "replacement"):
            options = options_of(r.request.prompt)
            assert options["E"] == prompts.CANNOT_ANSWER and r.letters == "ABCDE"
            assert options[r.gold] == "42"
            assert r.request.prefill == prompts.ANSWER_PREFILL
            orders.add(tuple(options.values()))
    assert len(orders) == 24


def test_draws_repeat_and_differ():
    first = [r.request for r in draw_rounds(task(), 4, "replacement")]
    assert first == [r.request for r in draw_rounds(task(), 4, "replacement")]
    assert [r.prompt for r in first] != [
        r.request.prompt for r in draw_rounds(task(index=1), 4, "replacement")
    ]


def test_stratified_asks_each_question_before_any_twice():
    for index in range(50):
        asked = [r.request.prompt for r in draw_rounds(task(index=index), 4, "stratified")]
        first = {q.question for q in QUESTIONS for prompt in asked[:3] if q.question in prompt}
        assert first == {q.question for q in QUESTIONS}


@pytest.mark.parametrize("kind", ["qa_expected", "qa_sampled"])
def test_failure_is_none_and_never_zero(kind):
    def chances(request, options):
        return (
            None if "dead" in request.prompt else {letter: float(o == "42") for letter, o in options.items()}
        )

    tasks = [
        task(questions=QUESTIONS[:1]),
        task("dead", QUESTIONS[:1], 1),
        task(questions=QUESTIONS[:1], index=2),
    ]
    batch = qa_rewards(tasks, ChanceReader(chances), replace(EXPECTED, kind=kind))
    assert batch.rewards == [pytest.approx(1.0), None, pytest.approx(1.0)]
    assert batch.failed_share == pytest.approx(1 / 3)


def test_one_failed_round_fails_its_caption():
    reader = ChanceReader(
        lambda r, options: (
            None if "topic" in r.prompt else {letter: float(o == "42") for letter, o in options.items()}
        )
    )
    assert qa_rewards([task()], reader, EXPECTED).rewards == [None]


def test_unparsed_answer_is_wrong_and_counted():
    reader = ChanceReader(lambda request, options: {"unknown": 1.0})
    batch = qa_rewards([task()], reader, SAMPLED)
    assert batch.rewards == [0.0] and batch.metrics["unparsed"] == 1.0


def test_little_mass_on_letters_falls_back_to_sampling():
    reader = ChanceReader(lambda request, options: {"nothing": 0.9, **dict.fromkeys(options, 0.02)})
    rounds = draw_rounds(task(), 6, "stratified")
    scores, metrics = expected_scores(rounds, reader, EXPECTED)
    assert metrics["fallback"] == 1.0 and set(scores) <= {0.0, 1.0}
    scores, metrics = expected_scores(rounds, reader, replace(EXPECTED, min_letter_mass=0.0))
    assert metrics["fallback"] == 0.0 and all(0 < s < 1 for s in scores)
