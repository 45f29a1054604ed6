import math

import pytest

from caprl_utils import prompts
from caprl_utils.config import load_experiment, load_profile
from caprl_utils.errors import UserError
from caprl_utils.models.base import Completion
from caprl_utils.records import Question
from caprl_utils.rl import rewards
from caprl_utils.rl.grpo import CaptionReward
from caprl_utils.rl.rewards import CaptionTask, Rollout, draw_rounds, final_score, qa_rewards, repeated_share
from caprl_utils.schema import RL, Reward
from tests.rl.conftest import ChanceReader, options_of

QUESTIONS = [
    Question(question="What is the value of Rome?", options=("17", "42", "5", "8"), answer="B"),
    Question(question="What is the topic?", options=("sales", "rain", "cats", "books"), answer="A"),
    Question(question="Who wrote it?", options=("Ann", "Bob"), answer="B"),
]


def using(reward: str = "qa_expected", **values) -> RL:
    how = {"rounds": 6, "question_draw": "stratified", "reader_temperature": 1.0}
    return RL(reward=reward, **how | values)


KINDS = pytest.mark.parametrize("kind", ["qa_expected", "qa_sampled"])


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
    return ChanceReader(lambda request, options: {letter: float(text in (letter, o)) for letter, o in options.items()})


@pytest.mark.parametrize(
    ("reader", "reward"),  # by hand: 6 stratified rounds ask each of the 3 questions twice; the extra option is wrong
    [(says("42"), 2 / 6), (says(prompts.CANNOT_ANSWER), 0.0), (knows(1.0), 1.0), (knows(0.0), 0.0)],
)
@KINDS
def test_hand_computed(reader, reward, kind):
    assert qa_rewards([task()], reader, using(kind)).rewards == [pytest.approx(reward, abs=1e-9)]


def test_expected_by_hand_at_temperature():
    """Two options and the extra one, p = 0.5, 0.3, 0.2; at T = 0.5 they become p^2, renormalised."""
    chances = {"Bob": 0.5, "Ann": 0.3}
    reader = ChanceReader(lambda r, options: {k: chances.get(o, 0.2) for k, o in options.items()})
    settings = using(rounds=1, reader_temperature=0.5)
    batch = qa_rewards([task(questions=QUESTIONS[2:])], reader, settings)
    assert batch.rewards == [pytest.approx(0.25 / (0.25 + 0.09 + 0.04))]
    assert batch.metrics["letter_mass"] == pytest.approx(1.0)
    assert batch.metrics["cannot_answer"] == pytest.approx(0.04 / 0.38)


def test_expected_is_the_mean_of_many_sampled():
    """Five standard errors of 3,000 draws; each key draws other questions, orders and answers."""
    how = {"rounds": 1, "question_draw": "replacement", "reader_temperature": 0.6}
    tasks = [task(index=i) for i in range(3000)]
    kinds = ("qa_sampled", "qa_expected")
    drawn, expected = (qa_rewards(tasks, knows(0.4), using(kind, **how)).rewards for kind in kinds)
    mean, p = sum(drawn) / len(drawn), sum(expected) / len(expected)
    assert 0.3 < p < 0.99
    assert abs(mean - p) < 5 * math.sqrt(p * (1 - p) / len(drawn))


def test_draws_repeat_the_extra_option_is_last_and_each_order_and_question_occurs():
    first = draw_rounds(task(), 4, "replacement")
    assert first == draw_rounds(task(), 4, "replacement") != draw_rounds(task(index=1), 4, "replacement")
    orders = set()
    for index in range(400):
        for r in draw_rounds(task(questions=QUESTIONS[:1], index=index), 1, "replacement"):
            options = options_of(r.request.prompt)
            assert options["E"] == prompts.CANNOT_ANSWER and r.letters == "ABCDE" and options[r.gold] == "42"
            assert r.request.prefill == prompts.ANSWER_PREFILL
            orders.add(tuple(options.values()))
    assert len(orders) == 24
    for index in range(50):  # a stratified draw asks each question before any twice
        asked = draw_rounds(task(index=index), 4, "stratified")
        assert {r.question for r in asked[:3]} == {q.question for q in QUESTIONS}


def test_the_authors_words_keep_the_reader_to_the_caption():
    """Two examples stand before the caption, one of them without an answer; the question is last."""
    reader = knows(1.0)
    reader.words = "authors"
    (reward,) = qa_rewards([task(questions=QUESTIONS[:1])], reader, using(rounds=1)).rewards
    (prompt,) = reader.prompts
    assert "strictly" in prompt and prompt.count("The answer is") == 2 and "The answer is E" in prompt
    assert prompt.count(prompts.CANNOT_ANSWER) == 3 and reward == pytest.approx(1.0)
    assert prompt.index("Rome is 42") < prompt.index("the value of Rome?")


@KINDS
def test_failure_is_none_and_never_zero(kind):
    """One round that the reader could not answer fails its caption."""

    def chances(request, options):
        failed = "dead" in request.prompt or "topic" in request.prompt
        return None if failed else {letter: float(o == "42") for letter, o in options.items()}

    one = QUESTIONS[:1]
    tasks = [task(questions=one), task("dead", one, 1), task(index=2), task(questions=one, index=3)]
    batch = qa_rewards(tasks, ChanceReader(chances), using(kind))
    assert batch.rewards == [pytest.approx(1.0), None, None, pytest.approx(1.0)]


def test_little_mass_on_letters_falls_back_to_sampling(monkeypatch):
    reader = ChanceReader(lambda request, options: {"nothing": 0.9, **dict.fromkeys(options, 0.02)})
    batch = qa_rewards([task()], reader, using())
    assert batch.metrics["fallback"] == 1.0 and batch.metrics["unparsed"] > 0
    monkeypatch.setattr(rewards, "MIN_MASS", 0.0)
    batch = qa_rewards([task()], reader, using())
    assert batch.metrics["fallback"] == 0.0 and 0 < batch.rewards[0] < 1


class Judge:
    """Rates captions by a table; None fails."""

    name = model_hash = "judge"

    def __init__(self, table):
        self.table = table

    def _of(self, request):
        return next(value for caption, value in self.table.items() if caption in request.prompt)

    def choice_logprobs(self, requests, choices):
        assert choices == [" 1", " 2", " 3", " 4", " 5"] and all(r.image == "i" for r in requests)
        return [None if (row := self._of(r)) is None else [math.log(p) for p in row] for r in requests]

    def generate(self, requests, sampling):
        return [Completion(r.id, 0, self._of(r), 1, "stop") for r in requests]


def rolled(*captions, ids=None):
    """A rollout of one image, its tokens the words, with the questions."""
    asked = [question.model_dump(mode="json") for question in QUESTIONS]
    rows = {"id": ids or ["a"] * len(captions), "image": ["i"] * len(captions), "questions": [asked] * len(captions)}
    return Rollout(captions, [len(caption.split()) for caption in captions], rows)


def test_vlm_score_is_the_expectation():
    judge = Judge({"good": [1e-9, 1e-9, 1e-9, 0.25, 0.75], "bad": [0.4, 1e-9, 1e-9, 1e-9, 0.1], "gone": None})
    batch = rewards.vlm(rolled("good", "bad", "gone"), judge, RL())
    # by hand: (4.75 - 1) / 4; scores 1 and 5 with weights 4 to 1 give 1.8, (1.8 - 1) / 4
    assert batch.rewards == [pytest.approx(0.9375), pytest.approx(0.2), None]
    assert batch.metrics["score_mass"] == pytest.approx(0.75)


def test_unified_reads_the_last_final_score_and_counts_what_has_none():
    said = {"Fine.\nFinal Score: 4": 0.75, "Final Score: 2\nNo. Final Score: **4.5**": 0.875, "Final Score: 1": 0.0,
            "Final Score: 87": None, "I would say four.": None}  # fmt: skip
    assert {text: final_score(text) for text in said} == said
    judge = Judge({"first": "Final Score: 5", "second": "Good.", "third": None})
    batch = rewards.unified(rolled("first", "second", "third"), judge, RL())
    assert batch.rewards == [1.0, None, None] and batch.metrics["unparsed"] == 0.5


def test_reward_as_trl_calls_it_sums_its_terms_logs_and_stops_when_too_many_failed():
    judge, extra, metrics = Judge({"good": [1e-9, 1e-9, 1e-9, 1e-9, 1.0], "gone": None}), {}, {}

    def call(max_failed_share):
        rl = RL(max_failed_share=max_failed_share, max_completion_tokens=20)
        reward = CaptionReward(Reward(terms={"vlm": 1.0, "length": 0.2}), {"vlm": judge}, rl, 0)
        captions = [[{"content": c}] for c in ("good", "gone", "good", "good")]
        reward.begin(captions, [[0] * n for n in (5, 5, 12, 15)], {"id": ["a"] * 4, "image": ["i"] * 4}, step=3)
        return reward(completions=captions, log_extra=extra.__setitem__, log_metric=metrics.__setitem__)

    assert call(0.5) == [pytest.approx(1.2), None, pytest.approx(1.12), pytest.approx(1.0)]
    assert extra["num_tokens"] == [5, 5, 12, 15] and metrics["failed_share"] == pytest.approx(1 / 4)
    assert metrics["reward_calls"] == 4
    with pytest.raises(UserError, match="1 of 4 captions could not be scored"):
        call(0.2)


def test_terms_say_what_they_ask_and_a_wrong_one_is_named():
    asked = Reward(terms={"qa": 1.0, "length": 0.2, "vlm": 0.5}, reader="prism_reader")
    assert rewards.roles_of(asked) == {"qa": "prism_reader", "vlm": "vlm_judge"}
    with pytest.raises(UserError, match=r"no term 'lenght'; did you mean length\?; known: qa, vlm, unified, correct"):
        rewards.roles_of(Reward(terms={"lenght": 1.0}))
    with pytest.raises(UserError, match="within_length multiplies other terms; name one beside it"):
        rewards.roles_of(Reward(terms={"within_length": 1.0}))


# A small world for the terms that look at the image, and for what a caption can cheat with

TRUE = ["The value of Rome is 42.", "The topic is sales.", "The author is Bob."]
FALSE = ["The value of Rome is 17.", "The topic is cats.", "The author is Ann."]
WHOLE = " ".join(TRUE)


class Looker:
    """Knows which sentences are true, and describes every image alike; prompts that hold "gone" fail."""

    name = model_hash = "looker"

    def __init__(self, mass=1.0, text=WHOLE):
        self.mass, self.text, self.prompts = mass, text, []

    def choice_logprobs(self, requests, choices):
        assert choices == [" A", " B"] and {r.prefill for r in requests} == {prompts.ANSWER_PREFILL}
        self.prompts += [r.prompt for r in requests]
        yes = [0.9 if any(sentence in r.prompt for sentence in TRUE) else 0.2 for r in requests]
        rows = [[math.log(self.mass * p), math.log(self.mass * (1 - p))] for p in yes]
        return [None if "gone" in r.prompt else row for r, row in zip(requests, rows, strict=True)]

    def generate(self, requests, sampling):
        assert sampling.temperature == 0 and sampling.max_tokens == 48
        self.prompts += [r.prompt for r in requests]
        return [Completion(r.id, 0, self.text, 1, "error" if self.text is None else "stop") for r in requests]


SETTINGS = using(rounds=3, max_completion_tokens=48)


def believes():
    """A reader that takes an option that the caption tells, any of several, else the last one."""

    def chances(request, options):
        told = [letter for letter, text in options.items() if f" {text}." in request.prompt.split("Question:")[0]]
        told = told or [letter for letter, text in options.items() if text == prompts.CANNOT_ANSWER]
        return {letter: 1 / len(told) for letter in told}

    return ChanceReader(chances)


def test_correct_is_the_mean_chance_of_each_different_sentence():
    looker = Looker()
    told = rolled(" ".join([TRUE[0], FALSE[1]]), " ".join([TRUE[0]] * 5), " ".join(FALSE), "", "No stop", "It is gone.")
    batch = rewards.correct(told, looker, SETTINGS)
    assert batch.rewards == [pytest.approx(v) for v in (0.55, 0.9, 0.2, 0.0, 0.2)] + [None]  # nothing said: 0
    assert batch.calls == len(looker.prompts) == 6  # a sentence that several captions of an image make is asked once
    assert looker.prompts[0] == prompts.VERIFY.format(sentence=TRUE[0]) and batch.metrics["verifier_mass"] == 1.0
    assert rewards.correct(rolled(TRUE[0]), Looker(mass=0.4), SETTINGS).rewards == [None]  # it would say something else
    assert rewards.correct(rolled(TRUE[0], TRUE[0], ids=["a", "b"]), Looker(), SETTINGS).calls == 2
    assert rewards.correct(rolled("", ""), None, SETTINGS).rewards == [0.0, 0.0]


@pytest.fixture
def references(monkeypatch):
    """Call with a captioner."""
    monkeypatch.setattr(rewards, "open_backend", lambda model, profile: model)
    return lambda captioner: rewards.References(captioner, None)


def test_precision_and_recall_against_one_reference_an_image(references):
    looker = Looker(text="A red bar, a blue bar")  # a, red, bar, blue
    known, told = references(looker), rolled("The red bar", "A red bar a blue bar. Bar!", "", ids=[*"aab"])
    assert rewards.precision(told, known, SETTINGS).rewards == [pytest.approx(2 / 3), 1.0, 0.0]
    batch = rewards.recall(told, known, SETTINGS)
    assert batch.rewards == [0.5, 1.0, 0.0] and batch.calls == 0  # each image once, for both terms
    assert looker.prompts == [prompts.CAPTION] * 2
    assert rewards.precision(told, references(Looker(text=None)), SETTINGS).rewards == [None] * 3
    opened = rewards.open_models(Reward(terms={"precision": 1, "fluency": 1, "recall": 1}), load_profile("mini"))
    assert list(opened) == ["precision", "recall"] and opened["precision"] is opened["recall"]


def test_a_gate_multiplies_and_none_stays_none():
    reward, told = Reward(terms={"correct": 2.0, "within_length": 7.0}), rolled(TRUE[0], "w " * 36 + ".", "It is gone.")
    batch = rewards.total(reward, {"correct": Looker()}, told, SETTINGS)  # 36 of 48 tokens are the limit
    assert batch.rewards == [pytest.approx(1.8), 0.0, None] and batch.metrics["reward_calls"] == 3
    assert rewards.within_length(Rollout("ab", [36, 37], {}), None, SETTINGS).rewards == [1.0, 0.0]


def test_terms_apart_count_alike_whatever_their_scale_and_within_their_image(references):
    by_hand = rewards.within_groups([1.0, 3.0, 5.0, None, 5.0], ["a", "a", "b", "b", "b"])
    assert by_hand == [pytest.approx(-0.7071, abs=1e-3), pytest.approx(0.7071, abs=1e-3), 0.0, None, 0.0]
    told = rolled(TRUE[0], " ".join(TRUE), "", " ".join([TRUE[0]] * 4))
    reward, models = Reward(terms={"recall": 0.001, "fluency": 1.0}), {"recall": references(Looker())}
    apart = reward.model_copy(update={"apart": True, "terms": {"recall": 1.0, "fluency": 1.0}})
    summed, alike = (rewards.total(one, models, told, SETTINGS).rewards for one in (reward, apart))
    assert summed[1] == pytest.approx(1.001) and sum(alike) == pytest.approx(0, abs=1e-3)
    assert alike.index(max(alike)) == 1 and alike.index(min(alike)) == 2


BASE = " ".join([TRUE[0], TRUE[1], FALSE[2]])
CHEATS = {
    "nothing": "",
    "one fact, repeated": " ".join([TRUE[0]] * 9),
    "every option": " ".join(f"It is {option}." for question in QUESTIONS for option in question.options),
}
PAYS = {("reward_judge", "one fact, repeated"), ("reward_judge", "every option")}  # a judge that likes length
PAYS |= {("reward_correct_3", "one fact, repeated")}  # one true sentence is all correct, and weighs the most there


@pytest.mark.parametrize(
    "name",
    ["short", "length_term", "reward_masked", "reward_correct", "reward_correct_3", "reward_balanced", "reward_judge"],
)
def test_which_cheat_earns_more_than_a_caption_of_the_base(name, references):
    reward = load_experiment(name, "mini")[0].reward
    judge = Judge({text: [1e-9, 1e-9, 1e-9, 0.5, 0.5] if len(text) > len(BASE) else [1.0, *[1e-9] * 4]
                   for text in sorted([BASE, *CHEATS.values()], key=len, reverse=True)})  # fmt: skip
    strong = references(Looker())
    models = {"qa": believes(), "vlm": judge, "correct": Looker(), "precision": strong, "recall": strong}
    found = rewards.total(reward, models, rolled(BASE, BASE, *CHEATS.values()), SETTINGS).rewards
    paying = {cheat for cheat, value in zip(CHEATS, found[2:], strict=True) if value > found[0]}
    assert {(name, cheat) for cheat in paying} == {pair for pair in PAYS if pair[0] == name}


def test_fluency_length_and_repeated_share_by_hand():
    assert rewards.fluency(rolled("a b c d a b c d", "", "short"), None, SETTINGS).rewards == [0.8, 0.0, 1.0]
    batch = rewards.length(Rollout("abcde", [0, 2048, 2560, 3072, 9999], {}), None, RL(max_completion_tokens=4096))
    assert batch.rewards == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert repeated_share("a b c d") == 0.0 and repeated_share("short") == 0.0
    assert repeated_share("a b c d a b c d") == pytest.approx(1 / 5)  # abcd, bcda, cdab, dabc, abcd
