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
from tests.rows import LAYOUTS, copies
from tests.scripted import Says

SAID = [  # after "The answer is", and without that start: one for each caption of an image
    (" {}", "{}"), (" {}.", "The answer is {}."), (" **{}**.", "**{}**"), (' "{}".', "Answer: {}"),
    (" {} because the caption says so.", "The answer is {} because the caption says so."),
    (" {}.\nThe caption says so.", "The caption tells it.\nSo the final answer is {}."),
]  # fmt: skip


def words_of(sample):
    """The right answer as a model would write it."""
    if sample.options and sample.gold in sample.options:  # MathVista's gold is the option's text
        return "ABCDEFGHIJ"[sample.options.index(sample.gold)]
    return sample.gold[0] if isinstance(sample.gold, list) else sample.gold


class Knows(Says):
    """Knows all answers, and says them in the words of `said` by the number of the caption."""

    def __init__(self, samples, said):
        self.right, self.said = {f"{s.benchmark}/{s.id}": words_of(s) for s in samples}, said
        super().__init__(lambda request: self.right[request.id.rpartition("#")[0]])

    def generate(self, requests, sampling, progress=None):
        forms = [self.said[int(request.id.rpartition("#")[2])][not request.prefill] for request in requests]
        texts = [form.format(self.words(request)) for form, request in zip(forms, requests, strict=True)]
        return [Completion(r.id, 0, text, 2, "stop") for r, text in zip(requests, texts, strict=True)]


FIELD = re.compile(r"(?ms)^(Response|Answer|Correct answer|Reference): (.+?)(?=\n(?:Answer:|Reply with))")


def judged(request):
    """Extracts the word that may be an answer, and agrees where answer and gold are the same."""
    field = dict(FIELD.findall(request.prompt))
    if "Response" in field:
        return f"Extracted: {re.sub(r' because.*', '', field['Response']).split()[-1].strip('.*')}"
    if "Reference" in field:
        return f"Grade: {1.0 if field['Reference'] in field['Answer'] else 0.0}"
    return f"Verdict: {'yes' if field['Correct answer'] in field['Answer'] else 'no'}"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A profile with all benchmarks in small copies, and their samples."""
    places = copies(tmp_path_factory.mktemp("data"), 1)
    profile = load_profile("smoke", {
        "prompts": "authors", "prism.paths": places, "prism.benchmarks": [*places],
        "prism.captions_per_image": len(SAID), "prism.judge_model": {"path": "judge"},
    })  # fmt: skip
    return profile, load_samples(profile)


def test_rows_in_the_columns_of_their_data_set_become_samples(loaded):
    firsts = {sample.benchmark: sample for sample in reversed(loaded[1])}
    for key, (_, _, first) in LAYOUTS.items():
        sample = firsts[key]
        assert (sample.question, sample.options, sample.gold) == first, key
        assert sample.meta["image_id"] and "secret" not in str(sample.meta) and sample.images[0]().size == (6, 4)


@pytest.mark.parametrize("looks", [False, True], ids=["caption", "image"])
def test_a_perfect_reader_gets_every_benchmark_right(looks, loaded, monkeypatch):
    profile, samples = loaded
    monkeypatch.setattr(prism, "open_backend", lambda model, profile: Says(judged))
    samples = [sample for sample in samples if not looks or len(sample.images) == 1]
    source, said = (image_itself(), SAID[::-1]) if looks else (Captioner(), SAID)
    record = prism.evaluate(profile, "all", source, Knows(samples, said), samples)
    means = {key: found["mean"] for key, found in record["values"]["benchmarks"].items()}
    assert means == dict.fromkeys(means, 1.0) and record["values"]["average"] == 1.0
    assert {*means} == {key for key, facts in load_registry().items() if not facts.loader}
    assert not record["left_out"] and sum(record["unparsed"].values()) == 0
