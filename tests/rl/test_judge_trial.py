"""Judges on pairs of captions of known truth: one that knows the facts is right, one that likes length is found out."""

import math
from dataclasses import replace

import pytest

from caprl_utils.config import load_profile
from caprl_utils.mini.world import statements
from caprl_utils.models.base import Completion
from caprl_utils.prism.loading import load_samples
from caprl_utils.rl import judge_trial


class Rater:
    """Scores a caption by a function of its text and of the facts of its image."""

    name = model_hash = "rater"

    def __init__(self, samples, rate):
        self.facts = {sample.meta["image_id"]: sample.meta["facts"] for sample in samples}
        self.rate = rate

    def _score(self, request):
        text = request.prompt[request.prompt.index("This is a") :]
        return 1 + 4 * self.rate(text, self.facts[request.id.split("/")[1]])

    def choice_logprobs(self, requests, choices):
        shares = [(self._score(r) - 1) / 4 for r in requests]
        return [[math.log(1.001 - s), -99.0, -99.0, -99.0, math.log(s + 0.001)] for s in shares]

    def generate(self, requests, sampling):
        return [Completion(r.id, 0, f"Fine.\nFinal Score: {self._score(r):.3f}", 5, "stop") for r in requests]


def truth(text, facts):
    told = [fact for fact in statements(text) if fact]
    right = {key for key, value in told if facts.get(key) == value}
    return len(right) / len(facts) * sum(facts.get(k) == v for k, v in told) / len(told) / (2 - len(right) / len(told))


def length(text, facts):
    return min(1.0, len(text) / 1000)


@pytest.mark.parametrize("role", ["vlm_judge", "reward_judge"])
def test_a_judge_that_knows_passes_and_one_that_likes_length_does_not(role, monkeypatch, tmp_path):
    profile = load_profile("smoke")
    samples = load_samples(profile)
    found = {}
    for rate in (truth, length):
        monkeypatch.setattr("caprl_utils.paths.RUNS", tmp_path / rate.__name__)
        monkeypatch.setattr(judge_trial, "open_backend", lambda *unused, rate=rate: Rater(samples, rate))
        record = judge_trial.trial(profile, role, samples)
        assert record["n"] == len({s.meta["image_id"] for s in samples}) and record["unparsed"] == 0
        assert judge_trial.trial(profile, role, samples)["finished"] == record["finished"]  # found complete
        found[rate] = record["values"]["pairs"]
    assert min(found[truth].values()) > 0.9
    likes = list(found[length].values())
    assert likes[2] == 1 and likes[3] == 0 and likes[4] == 0  # longer is better, whatever is said
    assert judge_trial.trial(profile, role, [replace(samples[0], meta={})]) is None  # nothing is known


class Verifier:
    """Knows what is shown, and takes every true sentence about a unit for false."""

    name = model_hash = "verifier"

    def __init__(self, samples):
        self.facts = {sample.meta["image_id"]: sample.meta["facts"] for sample in samples}

    def _yes(self, request):
        image, sentence = request.id.split("/", 1)
        ((key, value),) = statements(sentence)
        return key in self.facts[image] and (key != "unit") == (self.facts[image][key] == value)

    def choice_logprobs(self, requests, choices):
        return [[math.log(0.9), math.log(0.05)][:: 1 if self._yes(r) else -1] for r in requests]


def test_the_verifier_s_error_on_true_and_false_sentences(monkeypatch, tmp_path):
    profile = load_profile("smoke")
    samples = load_samples(profile)
    monkeypatch.setattr("caprl_utils.paths.RUNS", tmp_path)
    monkeypatch.setattr(judge_trial, "open_backend", lambda *unused: Verifier(samples))
    record = judge_trial.verify(profile, samples)
    true, wrong, not_shown = record["values"].values()
    with_unit = sum("unit" in facts for facts in Verifier(samples).facts.values())
    assert true["error"] == pytest.approx(with_unit / true["sentences"]) and not_shown["error"] == 0
    assert 0 < wrong["error"] <= with_unit / wrong["sentences"] and not_shown["sentences"] > record["n"]
    assert true["chance"] == pytest.approx(0.9 / 0.95 - true["error"] * 0.85 / 0.95)
    assert judge_trial.verify(profile, samples)["finished"] == record["finished"]  # found complete
    assert judge_trial.verify(profile, [replace(samples[0], meta={})]) is None
