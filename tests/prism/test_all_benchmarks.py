"""Every benchmark from rows in its own columns to a score: a reader that knows all gets 100 %, whatever its words."""

import re

import pytest

from caprl_utils.config import load_profile
from caprl_utils.models.base import Completion
from caprl_utils.prism import evaluate as prism
from caprl_utils.prism.benchmarks import load_registry
from caprl_utils.prism.loading import load_samples
from caprl_utils.prism.sources import image_itself
from tests.prism.test_prism import Captioner
from tests.rows import copies
from tests.scripted import Says


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return copies(tmp_path_factory.mktemp("data"), 1)


@pytest.fixture
def profile(places):
    return load_profile("smoke", {
        "prompts": "authors", "prism.paths": places, "prism.benchmarks": [*places], "prism.captions_per_image": 1,
        "prism.judge_model": {"path": "judge"},
    })  # fmt: skip


def words_of(sample):
    """The right answer as a model would write it."""
    if sample.options and sample.gold in sample.options:  # MathVista's gold is the option's text
        return "ABCDEFGHIJ"[sample.options.index(sample.gold)]
    return sample.gold[0] if isinstance(sample.gold, list) else sample.gold


class Knows(Says):
    """Knows all answers; `said` turns one into what it writes after "The answer is", `thought` without that start."""

    def __init__(self, samples, said, thought):
        self.right = {f"{s.benchmark}/{s.id}#0": words_of(s) for s in samples}
        self.forms = thought, said
        super().__init__(lambda request: self.right[request.id])

    def generate(self, requests, sampling, progress=None):
        texts = [self.forms[bool(r.prefill)].format(self.right[r.id]) for r in requests]
        return [Completion(r.id, 0, text, 2, "stop") for r, text in zip(requests, texts, strict=True)]


FIELD = re.compile(r"(?ms)^(Response|Answer|Correct answer|Reference): (.+?)(?=\n(?:Answer:|Reply with))")


def judged(request):
    """Extracts the last word and agrees where answer and gold are the same."""
    field = dict(FIELD.findall(request.prompt))
    if "Response" in field:
        return f"Extracted: {field['Response'].split()[-1].rstrip('.')}"
    if "Reference" in field:
        return f"Grade: {1.0 if field['Reference'] in field['Answer'] else 0.0}"
    return f"Verdict: {'yes' if field['Correct answer'] in field['Answer'] else 'no'}"


@pytest.mark.parametrize(("said", "thought"), [
    (" {}", "{}"), (" {}.", "The answer is {}."),
    (" {}.\nThe caption says so.", "The caption tells it.\nSo the final answer is {}."),
])  # fmt: skip
@pytest.mark.parametrize("looks", [False, True], ids=["caption", "image"])
def test_a_perfect_reader_gets_every_benchmark_right(said, thought, looks, profile, monkeypatch):
    samples = load_samples(profile)
    monkeypatch.setattr(prism, "open_backend", lambda model, profile: Says(judged))
    source = image_itself() if looks else Captioner()
    samples = [sample for sample in samples if not looks or len(sample.images) == 1]
    record = prism.evaluate(profile, "all", source, Knows(samples, said, thought), samples)
    means = {key: found["mean"] for key, found in record["values"]["benchmarks"].items()}
    assert means == dict.fromkeys(means, 1.0) and record["values"]["average"] == 1.0
    assert {*means} == {key for key, facts in load_registry().items() if not facts.loader}
    assert not record["left_out"] and sum(record["unparsed"].values()) == 0
