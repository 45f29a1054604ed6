"""Prism with scripted fakes: stages, resume, failures, scores, floors and ceilings."""

import math
from dataclasses import replace

import pytest
from PIL import Image

from caprl_utils import paths, prompts
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.models.base import Completion
from caprl_utils.prism import prism_scores
from caprl_utils.prism.loaders import Sample
from caprl_utils.prism.prism import evaluate
from caprl_utils.prism.prism_compare import (
    bootstrap_models,
    length_matched,
    sample_scores,
    where_lost,
)
from caprl_utils.prism.prism_scores import read_samples
from caprl_utils.prism.prism_sources import (
    EmptyCaptions,
    ImageItself,
    OtherImageCaptions,
    TrueCaptions,
    controls,
    cut,
)

COLOURS = ["red", "blue", "green", "white"]


class Captioner:
    """Tells the colour that the image is painted in, as often as `told` says; counts its images."""

    name, model_hash = "fake-captioner", "c0"

    def __init__(self, told=1.0, broken=()):
        self.told, self.broken, self.seen = told, set(broken), []

    def generate(self, requests, sampling, progress=None):
        self.seen += [request.id for request in requests]
        return [self._one(r, i) for r in requests for i in range(sampling.n)]

    def _one(self, request, index):
        if request.id in self.broken:
            return Completion(request.id, index, None, 0, "error", "no answer from the server")
        number = request.image.getpixel((0, 0))[0]
        fact = f"The colour is {COLOURS[number % 4]}." if (number % 10) / 10 < self.told else ""
        return Completion(request.id, index, f"This is a scene. {fact}", 8 if fact else 4, "stop")


class Reader:
    """Looks for an option, or for any colour, in the caption; without one its letters are improbable."""

    name, model_hash = "fake-reader", "r0"

    def __init__(self, die_after=None):
        self.die_after, self.asked, self.prompts = die_after, 0, []

    def choice_logprobs(self, requests, choices, progress=None):
        self._count(requests)
        rows = []
        for request in requests:
            caption, _, question = request.prompt.partition("\nQuestion:")
            options = question.splitlines()[1:]
            hits = [option.split(") ")[1] in caption for option in options]
            share = 0.9 / sum(hits) if any(hits) else 0.1 / len(hits)
            rows.append(
                [math.log(share if hit or not any(hits) else 1e-6) - 1e-3 * i for i, hit in enumerate(hits)]
            )
        return rows

    def generate(self, requests, sampling, progress=None):
        self._count(requests)
        assert sampling.temperature == 0 and all(r.prefill == prompts.ANSWER_PREFILL for r in requests)
        found = [next((c for c in COLOURS if f" {c}." in r.prompt), "unknown") for r in requests]
        return [Completion(r.id, 0, f" {text}", 2, "stop") for r, text in zip(requests, found, strict=True)]

    def _count(self, requests):
        self.asked += len(requests)
        self.prompts += [r.prompt for r in requests]
        if self.die_after is not None and self.asked > self.die_after:
            raise KeyboardInterrupt("killed")


def make_sample(number, benchmark, options=True):
    right = COLOURS[number % 4]
    image = Image.new("RGB", (4, 4), (number, 0, 0))
    return Sample(
        id=f"s{number}-{'mc' if options else 'short'}", benchmark=benchmark, images=(lambda: image,),
        question="What is the colour?", options=tuple(COLOURS) if options else (),
        gold=prompts.LETTERS[COLOURS.index(right)] if options else right,
        meta={"image_id": f"img{number}", "true_caption": f"This is a scene. The colour is {right}."},
    )  # fmt: skip


@pytest.fixture
def samples():
    """Two benchmarks; in the first, every image has two questions."""
    twice = [make_sample(n, "mini-scene") for n in range(10)]
    twice += [replace(sample, id=f"{sample.id}-again") for sample in twice]
    return twice + [make_sample(n, "mini-document", options=False) for n in range(10)]


@pytest.fixture
def profile(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    return load_profile("smoke")


def test_the_three_stages(profile, samples):
    captioner, reader = Captioner(told=0.5), Reader()
    record = evaluate(profile, "base", captioner, reader, samples)
    assert len(captioner.seen) == 20  # once an image, not once a question
    scene = record["values"]["benchmarks"]["mini-scene"]
    # images 0 to 4 are told; without the fact the fake reader says A, right for image 8 (0 mod 4)
    assert scene["mean"] == pytest.approx(0.6)
    assert scene["num_samples"] == 20 and scene["num_images"] == 10 and scene["num_rows"] == 40
    assert scene["caption_tokens"] == pytest.approx(6.0) and scene["low_letter_mass"] == 20
    document = record["values"]["benchmarks"]["mini-document"]
    assert document["mean"] == pytest.approx(0.5) and document["low_letter_mass"] is None
    assert record["values"]["average"] == pytest.approx(0.55)
    low, high = record["intervals"]["mini-scene"]
    assert 0 <= low < 0.6 < high <= 1
    rows = read_samples(paths.RUNS / "smoke" / "prism" / "base")
    assert len(rows) == 60 and rows[0]["model"] == "base" and rows[0]["options"] == COLOURS
    assert {row["caption"] for row in rows if row["image_id"] == "mini-scene/img9"} == {"This is a scene."}


def test_prompts_hold_caption_question_and_options(profile, samples):
    reader = Reader()
    evaluate(profile, "base", Captioner(), reader, samples[:1])
    assert reader.prompts[0] == prompts.read_question(
        "This is a scene. The colour is red.", "What is the colour?", COLOURS
    )


def test_a_complete_run_asks_nobody(profile, samples):
    first = evaluate(profile, "base", Captioner(), Reader(), samples)
    captioner, reader = Captioner(), Reader()
    assert evaluate(profile, "base", captioner, reader, samples) == first
    assert not captioner.seen and not reader.asked


def test_a_kill_changes_nothing_in_the_result(profile, samples, monkeypatch):
    monkeypatch.setattr("caprl_utils.prism.prism_answers.CHUNK_QUESTIONS", 8)
    whole = evaluate(profile, "whole", Captioner(told=0.5), Reader(), samples, label="m")
    for stop in (8, 30, 56):
        with pytest.raises(KeyboardInterrupt):
            evaluate(profile, f"cut{stop}", Captioner(told=0.5), Reader(die_after=stop), samples, label="m")
        captioner = Captioner(told=0.5)
        record = evaluate(profile, f"cut{stop}", captioner, Reader(), samples, label="m")
        assert record["values"] == whole["values"] and record["intervals"] == whole["intervals"]
        assert not captioner.seen  # the captions were there
        folder = paths.RUNS / "smoke" / "prism"
        assert read_samples(folder / f"cut{stop}") == read_samples(folder / "whole")


def test_a_failing_captioner_stops_and_goes_on(profile, samples):
    with pytest.raises(UserError, match="no answer from the server"):
        evaluate(profile, "base", Captioner(broken=["mini-scene/img3"]), Reader(), samples)
    assert not (paths.RUNS / "smoke" / "prism" / "base" / "result.json").exists()
    assert evaluate(profile, "base", Captioner(), Reader(), samples)["values"]["average"] == 1.0


def test_a_failing_reader_stops_and_goes_on(profile, samples):
    class Half(Reader):
        def choice_logprobs(self, requests, choices, progress=None):
            rows = super().choice_logprobs(requests, choices)
            return [None if i % 2 else row for i, row in enumerate(rows)]

    with pytest.raises(UserError, match="20 of 60 questions were not answered"):
        evaluate(profile, "base", Captioner(), Half(), samples)
    assert evaluate(profile, "base", Captioner(), Reader(), samples)["values"]["average"] == 1.0


def test_another_model_makes_another_run(profile, samples):
    evaluate(profile, "base", Captioner(), Reader(), samples)
    other = Captioner()
    other.model_hash = "c1"
    evaluate(profile, "base", other, Reader(), samples)
    assert other.seen


def test_another_reader_does_not_caption_again(profile, samples):
    evaluate(profile, "base", Captioner(), Reader(), samples)
    captioner, reader = Captioner(), Reader()
    reader.model_hash = "r1"
    evaluate(profile, "base", captioner, reader, samples)
    assert reader.asked and not captioner.seen
    evaluate(profile, "base-by-other", captioner, reader, samples, captions_run="base")
    assert not captioner.seen and not (paths.RUNS / "smoke" / "captions" / "base-by-other").exists()


def test_floors_and_ceilings(profile, samples):
    evaluate(profile, "base", Captioner(), Reader(), samples)
    empty = evaluate(profile, "empty", EmptyCaptions(), Reader(), samples)
    assert empty["values"]["benchmarks"]["mini-document"]["mean"] == 0.0
    assert empty["values"]["caption_tokens"] == 0.0
    assert empty["values"]["benchmarks"]["mini-scene"]["mean"] == pytest.approx(0.3)  # says A throughout
    true = evaluate(profile, "true", TrueCaptions(), Reader(), samples)
    assert true["values"]["average"] == 1.0 and true["values"]["caption_tokens"] is None
    other = evaluate(
        profile, "other", OtherImageCaptions(paths.RUNS / "smoke" / "prism" / "base"), Reader(), samples
    )
    assert other["values"]["average"] == pytest.approx(0.0)  # neighbours differ in colour


def test_longer_captions_are_cut_to_the_length_of_the_shorter(profile, samples):
    class Wordy(Captioner):
        model_hash = "w0"

        def _one(self, request, index):
            short = super()._one(request, index)
            return replace(short, text=f"This is a scene. It is nice and large. {short.text}", num_tokens=16)

    evaluate(profile, "base", Captioner(), Reader(), samples)
    evaluate(profile, "wordy", Wordy(), Reader(), samples)
    folder = paths.RUNS / "smoke" / "prism"
    found = controls(samples, folder / "base", [folder / "wordy"], lambda text: len(text.split()))
    assert list(found) == ["floor-empty", "floor-other-image", "wordy-cut", "ceiling-true-facts"]
    record = evaluate(profile, "wordy-cut", found["wordy-cut"], Reader(), samples)
    rows = read_samples(folder / "wordy-cut")
    assert {row["caption"] for row in rows} == {"This is a scene."}  # the second sentence does not fit
    assert record["values"]["caption_tokens"] == 4.0


@pytest.mark.parametrize(
    ("text", "num_words", "kept"),
    [
        ("One two. Three four. Five.", 4, "One two. Three four."),
        ("One two three. Four.", 2, "One two"),
        ("One two.", 9, "One two."),
        ("", 3, ""),
    ],
)
def test_cut(text, num_words, kept):
    assert cut(text, num_words) == kept


def test_the_image_itself_goes_to_the_reader(profile, samples):
    class Looker(Reader):
        def choice_logprobs(self, requests, choices, progress=None):
            rights = [r.image.getpixel((0, 0))[0] % 4 for r in requests]
            assert all(r.prompt.startswith(prompts.LOOK.split("\n")[0]) for r in requests)
            return [[-0.1 if i == right else -5.0 for i in range(4)] for right in rights]

        def generate(self, requests, sampling, progress=None):
            return [
                Completion(r.id, 0, COLOURS[r.image.getpixel((0, 0))[0] % 4], 1, "stop") for r in requests
            ]

    assert evaluate(profile, "image", ImageItself(), Looker(), samples)["values"]["average"] == 1.0


def test_true_captions_need_facts(profile, samples):
    bare = replace(samples[0], meta={})
    with pytest.raises(UserError, match="no true captions for mini-scene"):
        evaluate(profile, "true", TrueCaptions(), Reader(), [bare])


def test_a_tie_is_not_decided(profile, samples):
    class Even(Reader):
        def choice_logprobs(self, requests, choices, progress=None):
            return [[-1.5] * len(choices) for _ in requests]

    record = evaluate(profile, "even", Captioner(), Even(), samples[:4])
    assert record["values"]["benchmarks"]["mini-scene"]["mean"] == 0.0
    assert record["unparsed"] == {"mini-scene": 8}
    assert record["unparsed_rows"][0]["reason"] == "two letters equally likely"


def test_several_images_are_captioned_apart_and_joined(profile, samples):
    both = replace(samples[0], images=(*samples[0].images, *samples[1].images))
    reader = Reader()
    evaluate(profile, "multi", Captioner(), reader, [both])
    assert (
        "Image 1: This is a scene. The colour is red.\nImage 2: This is a scene. The colour is blue."
        in (reader.prompts[0])
    )


def test_caprl_scoring_needs_the_authors_reader(profile, samples):
    with pytest.raises(UserError, match="use 'sampled'"):
        evaluate(profile, "base", Captioner(), Reader(), samples, scoring="caprl")


def test_differences_are_paired_by_image():
    base = {"b": {(f"i{n}", f"s{n}-{q}"): float(n % 2) for n in range(20) for q in range(2)}}
    better = {"b": {key: 1.0 for key in base["b"]}}
    parts = bootstrap_models({"base": base, "better": better, "same": base}, 2000, 0)
    gap = parts["b"].difference("better", "base")
    assert gap.value == pytest.approx(0.5) and gap.low > 0.2 and gap.num_clusters == 20
    assert parts["average"].difference("better", "base").value == pytest.approx(0.5)
    assert parts["b"].difference("same", "base").low == 0.0


def test_models_of_other_samples_are_refused():
    with pytest.raises(UserError, match="a and b were not scored on the same samples"):
        bootstrap_models({"a": {"b": {("i", "s"): 1.0}}, "b": {"b": {("i", "other"): 1.0}}}, 100, 0)


def test_unscored_samples_are_counted_and_left_out():
    shared = {"benchmark": "b", "caption_index": 0, "num_tokens": 3, "finish_reason": "stop"}
    shared |= {"letter_mass": None, "parsed": "x", "answer": "x", "reason": None}
    rows = [
        {**shared, "sample_id": "1", "image_id": "1", "score": 1.0},
        {**shared, "sample_id": "2", "image_id": "2", "score": None},
    ]
    values = prism_scores.summarise(rows, 100, 0)["values"]["benchmarks"]["b"]
    assert values["mean"] == 1.0 and values["unscored"] == 1
    assert sample_scores(rows) == {"b": {("1", "1"): 1.0}}


def test_length_matching_pairs_the_nearest():
    def row(model_tokens, score, index):
        return {
            "benchmark": "b",
            "image_id": "i",
            "sample_id": "s",
            "caption_index": index,
            "num_tokens": model_tokens,
            "score": score,
        }

    ours = [row(100, 1.0, 0), row(20, 0.0, 1), row(50, 1.0, 2)]
    theirs = [row(21, 1.0, 0), row(52, 0.0, 1), row(60, 0.0, 2)]
    matched = length_matched(ours, theirs, 100, 0)
    assert matched.pairs == {"b": 2} and matched.share == pytest.approx(2 / 3)
    assert matched.parts["b"].difference("ours", "theirs").value == pytest.approx(0.0)  # 0-1 and 1-0
    assert matched.parts["average"].means == pytest.approx([0.5, 0.5])
    assert length_matched(ours[:1], theirs, 100, 0).parts == {}


def test_where_answers_are_lost():
    def row(score, caption, gold="42", options=()):
        return {"score": score, "caption": caption, "gold": gold, "options": options}

    lost = where_lost(
        [
            row(1.0, "The value is 42."),
            row(0.0, "The value is 42."),
            row(0.0, "The value is 142."),
            row(0.0, "It is blue.", "B", ["red", "Blue"]),
        ]
    )
    assert lost == {"right": 0.25, "wrong, but told": 0.5, "wrong, not told": 0.25}
