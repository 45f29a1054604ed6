"""Direct VQA with scripted models: scores, resume, several images, rotations, judge, command line."""

import math
from dataclasses import replace

import pytest
from PIL import Image

from caprl_utils import paths, prompts
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.models.base import Completion
from caprl_utils.prism import judging, vqa
from caprl_utils.prism.loaders import Sample
from caprl_utils.prism.prism_scores import read_samples
from caprl_utils.prism.vqa import evaluate_vqa

COLOURS = ["red", "blue", "green", "white"]


class Looker:
    """Sees the colour; wrong where the image's number is in `blind`. Dies after some questions."""

    name, model_hash = "looker", "v0"

    def __init__(self, blind=(), die_after=None):
        self.blind, self.die_after, self.asked = set(blind), die_after, 0

    def _see(self, request):
        self.asked += 1
        if self.die_after is not None and self.asked > self.die_after:
            raise KeyboardInterrupt("killed")
        assert request.prompt.startswith(prompts.LOOK.split("\n")[0])
        number = request.image.getpixel((0, 0))[0]
        return COLOURS[(number + (number in self.blind)) % 4]

    def choice_logprobs(self, requests, choices, progress=None):
        rows = []
        for request in requests:
            options = [line.split(") ")[1] for line in request.prompt.splitlines()[2:]]
            seen = self._see(request)
            rows.append([math.log(0.9 if option == seen else 0.01) for option in options])
        return rows

    def generate(self, requests, sampling, progress=None):
        return [Completion(r.id, 0, f" {self._see(r)}", 2, "stop") for r in requests]


def make_sample(number, benchmark="mini-scene", options=True, **meta):
    image = Image.new("RGB", (4, 4), (number, 0, 0))
    right = COLOURS[number % 4]
    return Sample(
        id=f"s{number}", benchmark=benchmark, images=(lambda: image,), question="What is the colour?",
        options=tuple(COLOURS) if options else (),
        gold=prompts.LETTERS[COLOURS.index(right)] if options else right,
        meta={"image_id": f"img{number}", **meta},
    )  # fmt: skip


@pytest.fixture
def samples():
    return [make_sample(n) for n in range(10)] + [
        make_sample(n, "mini-document", options=False) for n in range(10)
    ]


@pytest.fixture
def profile(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    return load_profile("smoke")


def test_scores_and_rows(profile, samples):
    record = evaluate_vqa(profile, "base", Looker(blind=[2, 3]), samples)
    scene = record["values"]["benchmarks"]["mini-scene"]
    assert scene["mean"] == pytest.approx(0.8) and scene["num_rows"] == 10
    assert scene["caption_tokens"] is None and scene["best_of"] == {}
    assert record["values"]["average"] == pytest.approx(0.8)
    low, high = record["intervals"]["average"]
    assert low < 0.8 < high
    rows = read_samples(paths.RUNS / "smoke" / "vqa" / "base")
    assert len(rows) == 20 and rows[0]["caption"] is None and rows[0]["model"] == "base"


def test_a_kill_changes_nothing_and_a_finished_run_asks_nobody(profile, samples, monkeypatch):
    monkeypatch.setattr("caprl_utils.prism.prism_answers.CHUNK_QUESTIONS", 4)
    whole = evaluate_vqa(profile, "whole", Looker(blind=[2]), samples, label="m")
    for stop in (5, 11, 17):
        with pytest.raises(KeyboardInterrupt):
            evaluate_vqa(profile, f"cut{stop}", Looker([2], stop), samples, label="m")
        again = Looker([2])
        record = evaluate_vqa(profile, f"cut{stop}", again, samples, label="m")
        assert record["values"] == whole["values"] and again.asked < len(samples)
        folder = paths.RUNS / "smoke" / "vqa"
        assert read_samples(folder / f"cut{stop}") == read_samples(folder / "whole")
    idle = Looker()
    assert evaluate_vqa(profile, "whole", idle, samples, label="m") == whole and not idle.asked


def test_questions_about_several_images_are_left_out_and_listed(profile, samples):
    both = replace(samples[0], id="both", images=samples[0].images * 2)
    record = evaluate_vqa(profile, "base", Looker(), [*samples, both])
    assert record["left_out"] == {"mini-scene": ["both"]} and record["n"]["mini-scene"] == 10
    with pytest.raises(UserError, match="exactly one image in mini-scene"):
        evaluate_vqa(profile, "base", Looker(), [both])


def test_a_circular_question_is_right_if_all_rotations_are(profile):
    def rotations(number, turns):
        base = make_sample(number, "mmbench")
        for turn in range(turns):
            options = (*COLOURS[turn:], *COLOURS[:turn])
            gold = prompts.LETTERS[options.index(COLOURS[number % 4])]
            yield replace(
                base, id=str(number + 1_000_000 * turn), options=options, gold=gold,
                meta={"image_id": str(number), "rotation": turn},
            )  # fmt: skip

    class OnceWrong(Looker):
        def generate(self, requests, sampling, progress=None):
            found = super().generate(requests, sampling)
            return [replace(c, text="white") if c.id == "mmbench/2000002#0" else c for c in found]

    samples = [sample for n in range(1, 4) for sample in rotations(n, 4 if n > 1 else 2)]
    record = evaluate_vqa(profile, "base", OnceWrong(), samples)
    found = record["values"]["benchmarks"]["mmbench"]
    assert found["num_samples"] == 3 and found["mean"] == pytest.approx(2 / 3)
    rows = read_samples(paths.RUNS / "smoke" / "vqa" / "base")
    assert (
        rows[1]["sample_id"] == "2" and rows[1]["score"] == 0.0 and rows[1]["gold"] == '["C", "B", "A", "D"]'
    )


class Judge:
    """Gives every second prompt 0.5, fails on `broken` prompts."""

    name, model_hash = "judge", "j0"

    def __init__(self, broken=0):
        self.broken, self.asked = broken, 0

    def __call__(self, texts):
        self.asked += len(texts)
        return [None if i < self.broken else "Grade: 0.5" for i in range(len(texts))]


def test_the_judge_is_named_and_its_replies_are_kept(profile):
    samples = [make_sample(n, "mmvet", options=False) for n in range(4)]
    without = evaluate_vqa(profile, "base", Looker(), samples)
    assert without["values"]["benchmarks"]["mmvet"]["unscored"] == 4 and without["values"]["average"] is None
    with pytest.raises(UserError, match="judge failed on 1 of 4 prompts"):
        evaluate_vqa(profile, "base", Looker(), samples, judge=Judge(broken=1))
    looker, judge = Looker(), Judge()
    record = evaluate_vqa(profile, "base", looker, samples, judge=judge)
    assert record["judge"] == "judge" and record["values"]["average"] == 0.5
    assert judge.asked == 1 and not looker.asked


def test_a_model_can_be_the_judge():
    class Backend:
        name, model_hash = "Qwen", "q0"

        def generate(self, requests, sampling, progress=None):
            assert sampling.temperature == 0.0
            return [Completion(r.id, 0, r.prompt.upper(), 1, "stop") for r in requests]

    judge = judging.ModelJudge(Backend())
    assert judge(["a", "b"]) == ["A", "B"] and judge.name == "Qwen"
    assert judging.fingerprint(judge)["model"] == "q0" and judging.fingerprint(None) is None


def test_the_profile_names_the_judge():
    assert judging.judge_of(load_profile("smoke")) is None
    with pytest.raises(UserError, match=r"did you mean prism\.judge_model\.path\?"):
        load_profile("smoke", {"prism.judge_model": {"path": "x", "pth": "y"}})


def test_command_line(profile, samples, monkeypatch, capsys):
    monkeypatch.setattr(vqa, "open_backend", lambda model, profile: Looker(blind=[1]))
    monkeypatch.setattr(vqa, "load_samples", lambda profile, names, count: samples[:count])
    assert vqa.main(["--model", "zoo:x", "--name", "base", "--num-samples", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["mini-scene", "80.0"] and "n 5, unparsed 0" in lines[0]
    assert vqa.main(["--model", "zoo:x", "--name", "base", "--scoring", "caprl"]) == 1
    assert "use 'sampled'" in capsys.readouterr().err
