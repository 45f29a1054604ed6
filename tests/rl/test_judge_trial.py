"""Judges on pairs of captions of known truth: one that knows the facts is right, one that likes length is found out."""

import math
from dataclasses import replace

import pytest

from caprl_utils.config import load_profile
from caprl_utils.mini.world import statements
from caprl_utils.models.base import Completion
from caprl_utils.prism.loading import load_samples
from caprl_utils.rl import judge_trial

PROFILE = load_profile("smoke", {"prism.num_samples": 4})


@pytest.fixture(scope="module")
def samples():
    return load_samples(PROFILE)


class Judge:
    """Rates a text by a function of it and of the facts of its image, from 0 to 1."""

    name = model_hash = "judge"

    def __init__(self, samples, rate):
        self.facts, self.rate = {sample.meta["image_id"]: sample.meta["facts"] for sample in samples}, rate

    def _rated(self, request):
        kind, _, rest = request.id.partition("/")
        if kind in self.facts:  # a sentence for the verifier
            return self.rate(rest, self.facts[kind])
        return self.rate(request.prompt[request.prompt.index("This is a") :], self.facts[rest.split("/")[0]])

    def choice_logprobs(self, requests, choices):
        between = [-99.0] * (len(choices) - 2)  # yes and no, or the digits 1 to 5
        rated = [self._rated(r) if between else 1 - self._rated(r) for r in requests]
        return [[math.log(1.001 - s), *between, math.log(s + 0.001)] for s in rated]

    def generate(self, requests, sampling):
        texts = [f"Fine.\nFinal Score: {1 + 4 * self._rated(r):.3f}" for r in requests]
        return [Completion(r.id, 0, text, 5, "stop") for r, text in zip(requests, texts, strict=True)]


def truth(text, facts):
    told = [fact for fact in statements(text) if fact]
    right = {key for key, value in told if facts.get(key) == value}
    return len(right) / len(facts) * sum(facts.get(k) == v for k, v in told) / len(told) / (2 - len(right) / len(told))


def length(text, facts):
    return min(1.0, len(text) / 1000)


@pytest.mark.parametrize("role", ["vlm_judge", "reward_judge"])
def test_a_judge_that_knows_passes_and_one_that_likes_length_does_not(role, samples, monkeypatch, tmp_path):
    found = {}
    for rate in (truth, length):
        monkeypatch.setattr("caprl_utils.paths.RUNS", tmp_path / rate.__name__)
        monkeypatch.setattr(judge_trial, "open_backend", lambda *unused, rate=rate: Judge(samples, rate))
        record = judge_trial.trial(PROFILE, role, samples)
        assert record["n"] == len({s.meta["image_id"] for s in samples}) and record["unparsed"] == 0
        found[rate] = record["values"]["pairs"]
    assert min(found[truth].values()) > 0.9
    likes = list(found[length].values())
    assert likes[2] == 1 and likes[3] == 0 and likes[4] == 0  # longer is better, whatever is said
    assert judge_trial.trial(PROFILE, role, [replace(samples[0], meta={})]) is None  # nothing is known


def knows(sentence, facts):
    """What is shown; but every true sentence about a unit is taken for false."""
    ((key, value),) = statements(sentence)
    return 0.9 if key in facts and (key != "unit") == (facts[key] == value) else 0.1


def test_the_verifier_s_error_on_true_and_false_sentences(samples, monkeypatch):
    judge = Judge(samples, knows)
    monkeypatch.setattr(judge_trial, "open_backend", lambda *unused: judge)
    record = judge_trial.verify(PROFILE, samples)
    true, wrong, not_shown = record["values"].values()
    with_unit = sum("unit" in facts for facts in judge.facts.values())
    assert true["error"] == pytest.approx(with_unit / true["sentences"]) and not_shown["error"] == 0
    assert 0 < wrong["error"] <= with_unit / wrong["sentences"] and not_shown["sentences"] > record["n"]
    assert true["chance"] == pytest.approx(0.9 - true["error"] * 0.8, abs=2e-3)
    assert judge_trial.verify(PROFILE, samples)["finished"] == record["finished"]  # found complete
    assert judge_trial.verify(PROFILE, [replace(samples[0], meta={})]) is None
