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
