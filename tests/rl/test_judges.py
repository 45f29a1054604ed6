import math

import pytest

from caprl_utils.models.base import Completion
from caprl_utils.rl.judges import final_score, unified_rewards, vlm_rewards
from caprl_utils.rl.scoring import JudgeReward, length_term, repeated_share
from caprl_utils.rl.trainer import RewardsFailedError
from caprl_utils.schema import RL, Experiment, Length, Reward


class Judge:
    """Rates captions by a table; None fails."""

    name = model_hash = "judge"

    def __init__(self, table):
        self.table = table

    def _of(self, request):
        return next(value for caption, value in self.table.items() if caption in request.prompt)

    def choice_logprobs(self, requests, choices, progress=None):
        assert choices == [" 1", " 2", " 3", " 4", " 5"] and all(r.image == "image" for r in requests)
        rows = [self._of(r) for r in requests]
        return [None if row is None else [math.log(p) for p in row] for row in rows]

    def generate(self, requests, sampling, progress=None):
        return [Completion(r.id, 0, self._of(r), 1, "stop") for r in requests]


def test_vlm_score_is_the_expectation():
    judge = Judge({"good": [1e-9, 1e-9, 1e-9, 0.25, 0.75], "bad": [0.4, 1e-9, 1e-9, 1e-9, 0.1], "gone": None})
    batch = vlm_rewards(["good", "bad", "gone"], ["image"] * 3, ["a", "b", "c"], judge)
    # by hand: (4.75 - 1) / 4; scores 1 and 5 with weights 4 to 1 give 1.8, (1.8 - 1) / 4
    assert batch.rewards == [pytest.approx(0.9375), pytest.approx(0.2), None]
    assert batch.metrics["score_mass"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("Fine.\nFinal Score: 4", 0.75),
        ("Final Score: 2\nNo. Final Score: **4.5**", 0.875),
        ("Final Score: 1", 0.0),
        ("Final Score: 87", None),
        ("I would say four.", None),
    ],
)
def test_unified_final_score(text, reward):
    assert final_score(text) == reward


def test_unified_counts_what_has_no_score():
    judge = Judge({"first": "Final Score: 5", "second": "Good.", "third": None})
    batch = unified_rewards(["first", "second", "third"], ["image"] * 3, ["a", "b", "c"], judge)
    assert batch.rewards == [1.0, None, None] and batch.metrics["unparsed"] == 0.5


def experiment(**reward) -> Experiment:
    return Experiment(name="x", reward=Reward(judge="vlm", **reward))


def call(reward, captions, lengths):
    extra, metrics = {}, {}
    state = type("State", (), {"global_step": 3})()
    values = reward(
        completions=[[{"content": c}] for c in captions], completion_ids=[[0] * n for n in lengths],
        trainer_state=state, log_extra=extra.__setitem__, log_metric=metrics.__setitem__,
        id=["a"] * len(captions), image=["image"] * len(captions), prompts=[],
    )  # fmt: skip
    return values, extra, metrics


def test_reward_function_adds_the_length_term_and_logs():
    judge = Judge({"good": [1e-9, 1e-9, 1e-9, 1e-9, 1.0], "gone": None})
    reward = JudgeReward(
        judge, RL(max_failed_share=0.5, max_completion_tokens=20),
        experiment(length=Length(full_share=0.5, zero_share=1.0)),
    )  # fmt: skip
    values, extra, metrics = call(reward, ["good", "gone", "good"], [5, 5, 15])
    assert values == [pytest.approx(1.2), None, pytest.approx(1.1)]
    assert extra["num_tokens"] == [5, 5, 15] and metrics["failed_share"] == pytest.approx(1 / 3)


def test_too_many_failures_stop():
    reward = JudgeReward(Judge({"gone": None, "good": [0.2] * 5}), RL(max_failed_share=0.4), experiment())
    with pytest.raises(RewardsFailedError, match="1 of 2 captions could not be scored"):
        call(reward, ["gone", "good"], [1, 1])


def test_length_term_by_hand():
    length = Length(full_share=0.5, zero_share=0.75, weight=0.2)
    assert [length_term(n, length, 4096) for n in (0, 2048, 2560, 3072, 9999)] == [0.2, 0.2, 0.1, 0.0, 0.0]


def test_repeated_share_by_hand():
    assert repeated_share("a b c d") == 0.0 and repeated_share("short") == 0.0
    assert repeated_share("a b c d a b c d") == pytest.approx(1 / 5)  # abcd, bcda, cdab, dabc, abcd
