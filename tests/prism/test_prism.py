"""Prism and direct VQA with scripted fakes: stages, resume, failures, scores, floors and ceilings, command line."""

import math
from dataclasses import replace

import pytest
from PIL import Image
from typer.testing import CliRunner

from caprl_utils import paths, prompts
from caprl_utils.__main__ import app
from caprl_utils.config import SET_ENV, load_profile
from caprl_utils.errors import UserError
from caprl_utils.models.base import Completion
from caprl_utils.prism import evaluate as prism
from caprl_utils.prism import score, scores
from caprl_utils.prism.evaluate import evaluate, evaluate_vqa
from caprl_utils.prism.scores import group_score, read_samples, sample_scores
from caprl_utils.prism.sources import captions_of_run, controls, images_of, other_image_captions, true_captions
from caprl_utils.prism.statistics import bootstrap_models
from caprl_utils.records import Sample
from caprl_utils.runs import load_result
from tests.rows import collection
from tests.scripted import Says, Words

COLOURS = ["red", "blue", "green", "white"]


class Captioner:
    """Tells the colour that the image is painted in, as often as `told` says; counts its images."""

    name, model_hash = "fake-captioner", "c0"

    def __init__(self, told=1.0, broken=(), tokens=8):
        self.told, self.broken, self.tokens, self.seen = told, set(broken), tokens, []

    def stream(self, requests, sampling):
        for request in requests:
            self.seen.append(request.id)
            yield from (self._one(request, index) for index in range(sampling.n))

    def _one(self, request, index):
        if request.id in self.broken:
            return Completion(request.id, index, None, 0, "error", "no answer from the server")
        number = request.image.getpixel((0, 0))[0]
        fact = f"The sky is {COLOURS[number % 4]}." if (number % 10) / 10 < self.told else ""
        return Completion(request.id, index, f"This is a scene. {fact}", self.tokens if fact else 4, "stop")


class Reader:
    """Looks for an option, or for any colour, in the caption; without one its letters are improbable. deaf: requests
    that it gives no letters for.
    """

    name, model_hash = "fake-reader", "r0"

    def __init__(self, deaf=lambda place, request: False):
        self.deaf, self.prompts = deaf, []

    def choice_logprobs(self, requests, choices, progress=None):
        self.prompts += [request.prompt for request in requests]
        rows = [self._letters(*request.prompt.split("\nQuestion:")) for request in requests]
        return [None if self.deaf(n, r) else row for n, (r, row) in enumerate(zip(requests, rows, strict=True))]

    def _letters(self, caption, question):
        hits = [option.split(") ")[1] in caption for option in question.splitlines()[1:]]
        share = 0.9 / sum(hits) if any(hits) else 0.1 / len(hits)
        return [math.log(share if hit or not any(hits) else 1e-6) - 1e-3 * i for i, hit in enumerate(hits)]

    def generate(self, requests, sampling, progress=None):
        assert sampling.temperature == 0 and all(r.prefill == prompts.ANSWER_PREFILL for r in requests)
        found = [next((c for c in COLOURS if f" {c}." in r.prompt), "unknown") for r in requests]
        return [Completion(r.id, 0, f" {text}", 2, "stop") for r, text in zip(requests, found, strict=True)]


def make_sample(number, benchmark="mini-scene", options=True):
    right = COLOURS[number % 4]
    image = Image.new("RGB", (4, 4), (number, 0, 0))
    return Sample(
        id=f"s{number}-{'mc' if options else 'short'}", benchmark=benchmark, images=(lambda: image,),
        question="What is the colour?", options=tuple(COLOURS) if options else (),
        gold=prompts.LETTERS[COLOURS.index(right)] if options else right,
        meta={"image_id": f"img{number}", "true_caption": f"This is a scene. The sky is {right}."},
    )  # fmt: skip


@pytest.fixture
def singles():
    """Two benchmarks, one question an image."""
    short = [make_sample(n, "mini-document", options=False) for n in range(10)]
    return [make_sample(n) for n in range(10)] + short


@pytest.fixture
def samples(singles):
    """The same; in the first benchmark, every image has two questions."""
    return [*singles[:10], *(replace(sample, id=f"{sample.id}-again") for sample in singles[:10]), *singles[10:]]


@pytest.fixture(scope="module")
def profile():
    return load_profile("smoke")


def folder_of(run, stage="prism"):
    return paths.RUNS / "smoke" / stage / run


def rows_of(run, stage="prism"):
    return read_samples(folder_of(run, stage))


def test_the_three_stages(profile, samples):
    captioner, reader = Captioner(told=0.5), Reader()
    record = evaluate(profile, "base", captioner, reader, samples)
    assert len(captioner.seen) == 20  # once an image, not once a question
    scene, document = (record["values"]["benchmarks"][name] for name in ("mini-scene", "mini-document"))
    # images 0 to 4 are told; without the fact the fake reader says A, right for image 8 (0 mod 4)
    assert scene["mean"] == pytest.approx(0.6) and document["mean"] == pytest.approx(0.5)
    assert (scene["num_samples"], scene["num_images"], scene["num_rows"]) == (20, 10, 40)
    assert scene["caption_tokens"] == pytest.approx(6.0)
    assert record["values"]["average"] == pytest.approx(0.55)
    low, high = record["intervals"]["mini-scene"]
    assert 0 <= low < 0.6 < high <= 1
    told = "This is a scene. The sky is red."
    assert prompts.read_question(told, "What is the colour?", COLOURS) in reader.prompts
    rows = rows_of("base")
    assert len(rows) == 60 and rows[0]["model"] == "base" and rows[0]["options"] == COLOURS
    assert {row["caption"] for row in rows if row["image_id"] == "mini-scene/img9"} == {"This is a scene."}


def test_what_is_asked_again(profile, singles):
    first = evaluate(profile, "base", Captioner(), Reader(), singles)
    idle, reader, other = Captioner(), Reader(), Captioner()
    assert evaluate(profile, "base", idle, reader, singles) == first
    assert not idle.seen and not reader.prompts
    reader.model_hash = "r1"  # another reader does not caption again
    evaluate(profile, "base-by-other", idle, reader, singles, captions_run="base")
    assert reader.prompts and not idle.seen
    assert not folder_of("base-by-other", "captions").exists()
    other.model_hash = "c1"
    evaluate(profile, "base", other, Reader(), singles)
    assert other.seen


@pytest.mark.parametrize(("captioner", "reader", "message"), [
    (Captioner(broken=[f"mini-scene/img{n}" for n in range(4)]), Reader(), "no answer from the server"),
    (Captioner(), Reader(deaf=lambda place, request: place % 2), "20 of 60 questions were not answered"),
])  # fmt: skip
def test_a_model_that_fails_stops_the_run_which_then_goes_on(captioner, reader, message, profile, samples):
    with pytest.raises(UserError, match=message):
        evaluate(profile, "base", captioner, reader, samples)
    assert not (folder_of("base") / "result.json").exists()
    assert evaluate(profile, "base", Captioner(), Reader(), samples)["values"]["average"] == 1.0


def test_what_fails_three_times_is_left_out_and_counted(profile, samples):
    captioner = Captioner(broken=["mini-scene/img3"])
    reader = Reader(deaf=lambda place, request: request.id == "mini-scene/s5-mc#0")
    record = evaluate(profile, "base", captioner, reader, samples)
    assert captioner.seen.count("mini-scene/img3") == 3 and record["values"]["average"] == 1.0
    assert record["left_out"] == {"mini-scene": dict.fromkeys(["s3-mc", "s3-mc-again"], "no caption of its image")}
    assert record["n"] == {"mini-scene": 18, "mini-document": 10}  # of s5 the other caption's answer is there
    assert record["unanswered"] == {"mini-scene/s5-mc#0": "the reader gave no letters"}
    assert evaluate(profile, "base", captioner, reader, samples) == record
    moved = other_image_captions(captions_of_run(folder_of("base")), images_of(samples))
    assert evaluate(profile, "other", moved, Reader(), samples)["left_out"] == record["left_out"]


def test_floors_ceilings_budgets_and_captions_joined_to_the_length_of_longer_ones(profile, samples, monkeypatch):
    for module in ("captions.caption", "prism.sources"):
        monkeypatch.setattr(f"caprl_utils.{module}.tokenizer_of", lambda model: Words())

    def runs(base, longer, *budgets):
        named = {base: profile.models.policy, longer: profile.models.policy}
        budgeted = load_profile("smoke", {"prism.token_budgets": [*budgets]})
        return controls(budgeted, samples, named, base, Captioner(0.5), [longer])

    for name, captioner in (("base", Captioner()), ("half", Captioner(0.5)), ("wordy", Captioner(tokens=17))):
        evaluate(profile, name, captioner, Reader(), samples)
    values = {name: evaluate(profile, name, s, Reader(), samples)["values"] for name, s in runs("base", "base").items()}
    empty, true = values["floor-empty"], values["ceiling-true-facts"]
    assert empty["benchmarks"]["mini-document"]["mean"] == empty["caption_tokens"] == 0.0
    assert empty["benchmarks"]["mini-scene"]["mean"] == pytest.approx(0.3)  # says A throughout
    assert true["average"] == 1.0 and true["caption_tokens"] == 9  # eight words and the end
    # the nearest in length: three reds and three blues have each other's, a green has a white's of the same length
    assert values["floor-other-image"]["average"] == pytest.approx(0.6)
    found = runs("half", "wordy", 4)
    assert list(found)[2:] == ["half-joined", "ceiling-true-facts", "half-first-4", "wordy-first-4"]
    records = {n: evaluate(profile, n, found[n], Reader(), samples) for n in ("half-joined", "wordy-first-4")}
    (told,) = {row["caption"] for row in rows_of("half-joined") if row["image_id"] == "mini-scene/img0"}
    assert told == "This is a scene. The sky is red. This is a scene. The sky is red."  # 15 of 17 tokens
    mean = records["half-joined"]["values"]["caption_tokens"]
    assert mean == pytest.approx((15 + 13) / 2)  # four captions were drawn: 4 x 3 + 1
    row = next(row for row in rows_of("wordy-first-4") if row["image_id"] == "mini-scene/img0")
    assert (row["caption"], row["num_tokens"], row["finish_reason"]) == ("This is a scene.", 4, "length")
    assert {row["num_tokens"] for row in rows_of("wordy")} == {17}  # as it was


def test_letters_equally_likely_share_the_score_and_are_told(profile, samples, monkeypatch):
    monkeypatch.setattr(Reader, "_letters", lambda *unused: [-1.5, -1.5, -9.0, -9.0])
    record = evaluate(profile, "even", Captioner(), Reader(), samples[:4])
    assert record["values"]["average"] == 0.25 and record["unparsed"] == {"mini-scene": 0}
    told = [(row["score"], row["parsed"], row["reason"]) for row in rows_of("even")[::2]]
    assert told == [(value, "A/B", "A/B equally likely") for value in (0.5, 0.5, 0.0, 0.0)]


def test_several_images_are_captioned_apart_and_joined(profile, samples):
    both, reader = replace(samples[0], images=(*samples[0].images, *samples[1].images)), Reader()
    evaluate(profile, "multi", Captioner(), reader, [both])
    told = "Image 1: This is a scene. The sky is red.\nImage 2: This is a scene. The sky is blue."
    assert told in reader.prompts[0]
    numbered = replace(both, id="numbered", meta=both.meta | {"image_numbers": [2, 4]})
    single = replace(samples[2], meta=samples[2].meta | {"image_numbers": [3]})
    evaluate(profile, "numbers", Captioner(), reader, [numbered, single])
    asked, told = "\n".join(reader.prompts), told.replace("Image 2", "Image 4").replace("Image 1", "Image 2")
    assert told in asked and "Image 3: This" in asked


def test_unscored_samples_are_counted_and_left_out():
    shared = {"benchmark": "b", "caption_index": 0, "num_tokens": 3, "parsed": "x", "facts": None}
    rows = [shared | {"sample_id": n, "image_id": n, "score": score} for n, score in (("1", 1.0), ("2", None))]
    values = scores.summarise(rows, 100, 0)["values"]["benchmarks"]["b"]
    assert values["mean"] == 1.0 and values["unscored"] == 1 and sample_scores(rows) == {"b": {("1", "1"): 1.0}}


def test_the_guesser_says_the_commonest_answer_of_other_images():
    """Nine questions of one text, three of another kind (one with options); an image never counts for itself."""
    asked = [("What colour?", gold, ()) for gold in ["red"] * 3 + ["blue"] * 4 + ["green"]]
    asked += [(f"What is the value of {city}?", "7", ()) for city in ("Rome", "Oslo")]
    asked += [("What is the value of Bern?", "B", ("9", "7"))]
    rows = [
        {"benchmark": "b", "image_id": f"i{n}", "sample_id": "s", "caption_index": 0, "question": question,
         "gold": gold, "options": list(options), "score": 0.0}
        for n, (question, gold, options) in enumerate(asked)
    ]  # fmt: skip
    rows[3]["image_id"] = rows[4]["image_id"]  # two blues on one image leave three reds of others
    rows.append(rows[7] | {"image_id": "other", "score": None})
    found = [row["score"] for row in scores.most_frequent(rows)]
    assert found == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, None]


WEMATH = ["TT-T", "TF-T", "FF-T", "TT-F", "TF-F", "TTT-T", "TFF-T", "FFF-F"]


def wemath_group(number, marks):
    """Samples of one problem group, each about a picture of its own, and whether each is to be answered right."""
    steps, multi = marks.split("-")
    names = [f"{len(steps)}steps_{place}" for place in (*range(1, len(steps) + 1), "multi")]
    for place, (name, mark) in enumerate(zip(names, steps + multi, strict=True)):
        base = make_sample(4 * number + place, "wemath")
        told = base.gold if mark == "T" else prompts.LETTERS[(prompts.LETTERS.index(base.gold) + 1) % 4]
        more = {"ID": str(number), "true_caption": f"The sky is {COLOURS['ABCD'.index(told)]}."}
        yield replace(base, id=f"{number}-{name}", meta=base.meta | more)


def test_wemath_prints_the_four_dimensional_score(profile):
    samples = [s for number, marks in enumerate(WEMATH) for s in wemath_group(number, marks)]
    record = evaluate(profile, "base", true_captions(len), Reader(), samples)
    found, rows = record["values"]["benchmarks"]["wemath"], rows_of("base")
    # worked by hand: 2 groups mastered, 1 generalized inadequately, 3 by rote, 2 insufficient
    assert found["mean"] == record["values"]["average"] == pytest.approx((2 + 0.5) / 8)
    assert found["num_samples"] == found["num_rows"] == 27
    low, high = record["intervals"]["wemath"]
    assert 0 <= low < 2.5 / 8 < high <= 1
    assert sum(row["score"] for row in rows) == "".join(WEMATH).count("T")  # rows stay per question
    parts = bootstrap_models({"m": sample_scores(rows)}, 100, 0)
    assert parts["wemath"].interval("m").value == found["mean"] and parts["wemath"].num_clusters == 8
    double = [row | {"caption_index": 1, "score": 1.0} for row in rows]  # all right: the mean of both captions
    both = scores.summarise(rows + double, 100, 0)["values"]["benchmarks"]["wemath"]
    assert both["mean"] == pytest.approx((2.5 / 8 + 1) / 2) and both["best_of"] == {"2": 1.0}
    for half, value in (("1 2", None), ("1 multi", None), ("1 2 multi", 1.0)):
        assert group_score({f"g-2steps_{part}": True for part in half.split()}) == value


# --- direct VQA ---


class Looker(Says):
    """Sees the colour; wrong where the image's number is in `blind`. Counts its questions."""

    def __init__(self, blind=()):
        self.blind, self.asked = blind, 0
        super().__init__(self._see)

    def _see(self, request):
        self.asked += 1
        assert request.prompt.startswith(prompts.LOOK.split("\n")[0])
        number = request.image.getpixel((0, 0))[0]
        return COLOURS[(number + (number in self.blind)) % 4]


def test_vqa_asks_about_the_image_and_leaves_questions_about_several_out(profile, singles):
    both = replace(singles[0], id="both", images=singles[0].images * 2)
    record = evaluate_vqa(profile, "base", Looker(blind=[2, 3]), [*singles, both])
    scene = record["values"]["benchmarks"]["mini-scene"]
    assert scene["mean"] == pytest.approx(0.8) and scene["num_rows"] == 10
    assert scene["caption_tokens"] is None and scene["best_of"] == {}
    rows, (low, high) = rows_of("base", "vqa"), record["intervals"]["average"]
    assert low < 0.8 < high and record["values"]["average"] == pytest.approx(0.8)
    assert len(rows) == 20 and rows[0]["caption"] is None and rows[0]["model"] == "base"
    assert record["left_out"] == {"mini-scene": {"both": "2 images"}} and record["n"]["mini-scene"] == 10
    with pytest.raises(UserError, match=r"no question of mini-scene could be asked .*2 images"):
        evaluate_vqa(profile, "base", Looker(), [both])


def test_a_circular_question_is_right_if_all_rotations_are(profile):
    def rotations(number, turns):
        base = make_sample(number, "mmbench")
        for turn in range(turns):
            options = (*COLOURS[turn:], *COLOURS[:turn])
            gold = prompts.LETTERS[options.index(COLOURS[number % 4])]
            meta = {"image_id": str(number), "rotation": turn}
            yield replace(base, id=str(number + 1_000_000 * turn), options=options, gold=gold, meta=meta)

    samples, looker = [sample for n in range(1, 4) for sample in rotations(n, 4 if n > 1 else 2)], Looker()
    looker.words = lambda request: "white" if request.id == "mmbench/2000002#0" else looker._see(request)
    found = evaluate_vqa(profile, "base", looker, samples)["values"]["benchmarks"]["mmbench"]
    assert found["num_samples"] == 3 and found["mean"] == pytest.approx(2 / 3)
    row = rows_of("base", "vqa")[1]
    assert (row["sample_id"], row["score"], row["gold"]) == ("2", 0.0, '["C", "B", "A", "D"]')


def test_the_judge_is_named_and_its_replies_are_kept(profile, monkeypatch):
    class Judge(Says):
        name, asked = "judge", 0

        def generate(self, requests, sampling, progress=None):
            Judge.asked += len(requests)
            found = super().generate(requests, sampling)
            return [replace(found[0], text=None), *found[1:]] if Judge.asked == 4 else found  # of the first call

    samples = [replace(make_sample(n, "mmvet", options=False), question=f"{n}?") for n in range(4)]
    without = evaluate_vqa(profile, "base", Looker(), samples)
    assert without["values"]["benchmarks"]["mmvet"]["unscored"] == 4 and without["values"]["average"] is None
    judged = load_profile("smoke", {"prism.judge_model": {"path": "x"}})
    monkeypatch.setattr(prism, "open_backend", lambda model, profile: Judge(lambda request: "Grade: 0.5"))
    with pytest.raises(UserError, match="judge failed on 1 of 4 prompts"):
        evaluate_vqa(judged, "base", Looker(), samples)
    record = evaluate_vqa(judged, "base", looker := Looker(), samples)
    assert record["judge"] == "judge" and record["values"]["average"] == 0.5
    assert Judge.asked == 5 and not looker.asked


# --- caprl score (files of captions: test_given.py) ---


def test_the_authors_protocol_is_one_command(tmp_path, monkeypatch):
    """Their rows, prompts, sampling and scorer; what cannot be used is told."""
    folder = collection(tmp_path / "files", [{"answer": "B"}, {"answer": "A"}, {"answer": None}])

    class Thinker(Says):
        def generate(self, requests, sampling, progress=None):
            assert (sampling.temperature, sampling.max_tokens) == (1.0, 2048)
            assert all(r.prompt.endswith("based on the caption.\nWhere?\nA. in\nB. on") for r in requests)
            return super().generate(requests, sampling)

    opened, reader = {"zoo:x": Captioner()}, Thinker(lambda request: "<think>a</think> <answer>\\boxed{B}</answer>")
    monkeypatch.setattr(score, "open_backend", lambda model, profile: opened.get(model.path, reader))
    monkeypatch.setenv(SET_ENV, "")
    done = CliRunner().invoke(app, ["score", "zoo:x", "--authors", str(folder), "--profile", "smoke"])
    assert done.exit_code == 0, done.output
    assert "| seed2k    | 50.0 [" in done.output and "no placebo: a benchmark has not two pictures" in done.output
    assert "set aside: 1 questions; first: the answer is None" in done.output
    record = load_result(folder_of("zoo-x"))
    assert record["captions_per_image"] == 4 and record["scoring"] == "caprl"
    assert record["data"]["seed2k"]["path"].endswith("json_file/lmm_eval_seed2k.json")


@pytest.mark.integration
def test_score_command_loads_models_and_benchmarks(monkeypatch):
    monkeypatch.setenv(SET_ENV, "")  # the command sets it for the processes that it starts
    command = ["score", "zoo:base", "--benchmark", "mini-scene", "--num-samples", "4", "--set",
               "prism.caption_max_tokens=4", "--set", "prism.captions_per_image=1", "--profile", "smoke"]  # fmt: skip
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0 and "| mini-scene | " in first.stdout, first.output
    direct = CliRunner().invoke(app, [*command, "--direct"])
    assert direct.exit_code == 0 and direct.stdout.splitlines()[-1].endswith("vqa/zoo-base")


def test_what_a_key_covers():
    """What computes a score is in the key; reports, servers' clients, progress and pages are not."""
    computing = ("prism.evaluate", "prism.scores", "prism.metrics", "prism.statistics", "prompts", "models.local")
    assert {f"caprl_utils.{name}" for name in computing} <= {*prism.RECIPE}
    banned = ("reports", "gallery", "endpoint", "client", "progress", "runs", "loading", "html")
    assert not [name for name in prism.RECIPE if any(word in name for word in banned)]
