"""Curation from images to parquet with scripted models that know the mini world: funnel, resume, failures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence

import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from caprl_utils import paths, prompts
from caprl_utils.__main__ import app
from caprl_utils.config import SET_ENV, load_profile
from caprl_utils.curation import pipeline
from caprl_utils.curation.extract import QuestionSet
from caprl_utils.curation.keep import QA_FILE, measured, read_qa
from caprl_utils.errors import UserError
from caprl_utils.image_sources import _Place, open_images
from caprl_utils.images import BadImage, BadImageError, ImageItem
from caprl_utils.models.base import Completion, Request, Sampling
from caprl_utils.records import Question, text_key
from caprl_utils.registry import drawn_source
from caprl_utils.runs import load_result


class Knowing:
    """Knows what is true of the images: writes five questions about one, the first leaking where it can; answers facts
    with the image, known things always, else ` unknown`. `broken` ids fail.
    """

    def __init__(self, name: str, items: Sequence[ImageItem] = ()) -> None:
        self.name = self.model_hash = name
        self.meta = {item.id: item.meta for item in items}
        self.broken: set[str] = set()
        self.asked: list[str] = []

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        for request in requests:
            self.asked.append(request.id)
            if request.id in self.broken:
                yield Completion(request.id, 0, None, 0, "error", "server is down")
            else:
                text = f" {self._answer(request)}" if "#" in request.id else self._written(request.id)
                yield Completion(request.id, 0, text, 2, "stop")

    def _written(self, image_id: str) -> str:
        meta, text = self.meta[image_id], ""
        pairs = list((dict(list(meta["known"].items())[:1]) | meta["facts"]).items())[:5]
        for number, (key, value) in enumerate(pairs, start=1):
            options = prompts.format_options([value, f"not {value}", "something else", "nothing"])
            text += f"**{number}. What is the {key}?**{options}\n**Answer:** A) {value}\n"
        return text

    def _answer(self, request: Request) -> str:
        meta, view = self.meta[request.id.split("#")[0]], request.id.split("/")[-2]
        question, *options = request.prompt.split("Question: ")[1].split("\n")
        known = meta["facts"] | meta["known"] if view in ("visual", "open") else meta["known"]
        value = known.get(question.removeprefix("What is the ").removesuffix("?"), "unknown")
        return next((option[0] for option in options if text_key(option[2:]) == text_key(value)), value)


FEW = {"images.num_images": 5}


@pytest.fixture
def profile():
    return load_profile("smoke", FEW)


@pytest.fixture(scope="module")
def items():
    return list(open_images(load_profile("smoke", FEW)))


@pytest.fixture
def models(profile, items, monkeypatch):
    """Writer and reader; the images are drawn once for all stages and tests."""
    writer, reader = Knowing("writer", items), Knowing("reader", items)
    roles = {profile.models.question_writer.path: writer, profile.models.question_filter.path: reader}
    monkeypatch.setattr(pipeline, "open_backend", lambda model, _: roles[model.path])
    monkeypatch.setattr(pipeline, "open_images", lambda *_, **__: iter(items))
    return writer, reader


def test_the_command_goes_from_images_to_parquet(models, items, monkeypatch, runs_folder):
    monkeypatch.setenv(SET_ENV, "")
    command = ["curate", "--profile", "smoke", "--set", "images.num_images=5", "--as-they-are"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "25 questions asked for" in done.output and " 5 images with kept questions: " in done.output
    folder = runs_folder / "smoke" / "curation" / "main"
    values, truth = (made := load_result(folder)["values"]), made["truth"]
    assert values["images_read"] == values["images_written_about"] == values["images_kept"] == 5
    assert values["questions_extracted"] == values["questions_asked_for"] == 25
    assert truth["leaking"] > 0
    assert truth["leaking_removed"] == truth["sound_kept"] == truth["precision"] == 1.0
    rows = list(read_qa(folder / QA_FILE))
    assert [row.id for row in rows] == [item.id for item in items]
    assert sum(len(row.questions) for row in rows) == values["questions_kept"]
    table = pq.read_table(folder / "questions.parquet").to_pylist()
    leaking = [row for row in table if row["truth"] == "leaking"]
    assert all(row["text_accuracy"] == 1.0 and row["verdict"] != "kept" for row in leaking)
    asked = [len(model.asked) for model in models]
    assert CliRunner().invoke(app, command).output == done.output
    assert [len(model.asked) for model in models] == asked  # a complete run asks nothing again


def test_failed_rows_are_listed_and_tried_again_and_too_many_stop_the_stage(profile, models):
    writer = models[0]
    failing = sorted(writer.meta)[:2]
    job = pipeline.open_job(profile)
    pipeline.check_images(job)
    writer.broken = set(writer.meta)
    with pytest.raises(UserError, match=r"max_bad_share.*'rl-chart-000000'.*generated\.jsonl"):
        pipeline.write_questions(job)
    for broken, asked in ((failing, sorted(writer.meta)), ([], failing)):
        job.run.close()
        writer.broken, writer.asked, job = set(broken), [], pipeline.open_job(profile)
        pipeline.write_questions(job)
        assert sorted(writer.asked) == asked
        failed = json.loads((job.run.folder / "generated.failed.json").read_text())
        assert failed == dict.fromkeys(broken, "server is down")
    assert len(job.rows(pipeline.WRITTEN)) == 5


def test_answers_do_not_depend_on_where_a_run_stopped(profile, models):
    whole = pipeline.open_job(profile, name="whole")
    pipeline.curate(whole)
    expected = {row.id: row for row in whole.rows(pipeline.ANSWERED).read(QuestionSet)}
    _, reader = models
    stream = reader.stream

    def stops(requests, sampling):
        for number, completion in enumerate(stream(requests, sampling)):
            if number == 100:
                raise KeyboardInterrupt
            yield completion

    reader.stream = stops
    with pipeline.open_job(profile, name="stopped").run, pytest.raises(KeyboardInterrupt):
        pipeline.curate(stopped := pipeline.open_job(profile, name="stopped"))
    assert 0 < len(stopped.rows(pipeline.ANSWERED)) < 5
    stopped.run.close()
    reader.stream = stream
    job = pipeline.open_job(profile, name="stopped")
    pipeline.curate(job)
    assert {row.id: row for row in job.rows(pipeline.ANSWERED).read(QuestionSet)} == expected


def test_the_filter_is_asked_as_released():
    """For the letter alone, and with the image it may say that no option is right, which is a wrong answer."""
    question = Question(question="Which?", options=("a", "b", "c", "d"), answer="A", number=1)
    settings = load_profile("smoke", {"prompts": "authors", "curation.rounds": 1})
    job = pipeline.Job(settings, 0, None, None, None, None)
    asked = list(pipeline.requests_about(job, "i", [question], Image.new("RGB", (9, 9)), None))
    seen, guessed, bare = asked
    assert seen.prompt.endswith("E) None of the above. Answer the question with only the correct letter")
    assert "None of" not in guessed.prompt and guessed.image is None and seen.prefill == guessed.prefill == ""
    said = {r.id: Completion(r.id, 0, "a" if r is bare else "E", 1, "stop") for r in asked}
    found = pipeline.with_answers(job, "i", question, said)
    assert (found.visual, found.text, measured("i", found)["visual_accuracy"]) == (("E",), (None,), 0.0)


def test_repeated_ids_are_set_aside_and_what_cannot_be_read_is_tried_again(tmp_path, monkeypatch):
    profile = load_profile("smoke", {"images.source": str(tmp_path / "list.txt")})
    (tmp_path / "list.txt").write_text("a.png\nb.png\na.png\n")
    for name in "ab":
        Image.effect_noise((99, 99), 90).save(tmp_path / f"{name}.png")
    read, closed = _Place.read, ["b.png"]

    def fails(place, name, *part):
        if name in closed:
            raise BadImageError(BadImage.UNREADABLE)
        return read(place, name, *part)

    monkeypatch.setattr(_Place, "read", fails)
    monkeypatch.setattr(pipeline, "open_backend", lambda *_: Knowing("none"))
    job = pipeline.open_job(profile)
    with job.run, pytest.raises(UserError, match=r"2 of 3 images cannot be read, .* row 'a.png \(a.png\)': id used by"):
        pipeline.check_images(job)
    assert list(json.loads((job.run.folder / "images.failed.json").read_text())) == ["b.png"]
    closed.clear()
    job = pipeline.open_job(profile)
    pipeline.check_images(job)
    reasons = {row["id"]: row["reason"] for row in job.rows(pipeline.CHECKED).read()}
    assert reasons == {"a.png": None, "b.png": None, "a.png (a.png)": "id used by an earlier image"}
    assert [item.id for item in job.good_images()] == ["a.png", "b.png"]


def test_a_source_without_any_image_is_named(profile, models, monkeypatch):
    monkeypatch.setattr(pipeline, "open_images", lambda *_, **__: iter(()))
    with pytest.raises(UserError, match=r"images\.source 'mini-world' holds no image"):
        pipeline.curate(pipeline.open_job(profile))


@pytest.mark.integration
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["one_gpu", "paper"])
def test_notebook_01_runs_to_its_checks_with_the_settings_of_the_sizes_that_need_gpus(
    name, real_profile, runs_folder, tmp_path
):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        image_id, image, *_ = drawn_source("mini-world").image_at("rl", number, None, 0)
        image.save(folder / f"{image_id}.png")
    file = real_profile(
        name,
        models={"question_writer": {"path": "zoo:strong"}, "question_filter": {"path": "zoo:base"}},
        prompts="short",  # the words that zoo models know
        images={"source": str(folder), "num_images": 20},
        curation={"max_tokens": 160},
    )
    command = [sys.executable, "-m", "caprl_utils", "run", "01_qa_curation", "-p", f"profile={file}"]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert (runs_folder / file.stem / "curation" / "main" / QA_FILE).is_file()
