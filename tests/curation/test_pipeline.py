"""Curation from images to parquet with scripted models that know the mini world: funnel, resume, failures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from caprl_utils import prompts
from caprl_utils.__main__ import app
from caprl_utils.config import SET_ENV, load_profile
from caprl_utils.curation import pipeline
from caprl_utils.curation.extract import QuestionSet
from caprl_utils.curation.keep import measured, read_qa
from caprl_utils.errors import UserError
from caprl_utils.hashing import code_hashes
from caprl_utils.image_sources import _Place, open_images
from caprl_utils.images import BadImage, BadImageError, ImageItem
from caprl_utils.models.base import Completion, Request, Sampling
from caprl_utils.records import Question, text_key


class FakeWriter:
    """Writes five questions about the facts that `truth` knows; `broken` ids fail."""

    name, model_hash = "fake writer", "writer"

    def __init__(self, items: Sequence[ImageItem]) -> None:
        self.meta = {item.id: item.meta for item in items}
        self.broken: set[str] = set()
        self.asked: list[str] = []

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        for request in requests:
            self.asked.append(request.id)
            if request.id in self.broken:
                yield Completion(request.id, 0, None, 0, "error", "server is down")
            else:
                yield Completion(request.id, 0, self._write(request.id), 99, "stop")

    def _write(self, image_id: str) -> str:
        """One leaking question where there is one, then sound ones."""
        meta = self.meta[image_id]
        pairs = list((dict(list(meta["known"].items())[:1]) | meta["facts"]).items())[:5]
        text = ""
        for number, (key, value) in enumerate(pairs, start=1):
            options = [value, f"not {value}", "something else", "nothing"]
            text += f"**{number}. What is the {key}?**{prompts.format_options(options)}\n**Answer:** A) {value}\n"
        return text


class FakeReader:
    """Answers from the truth: facts with the image, known things always, the rest ` unknown`."""

    name, model_hash = "fake reader", "reader"

    def __init__(self, items: Sequence[ImageItem]) -> None:
        self.facts = {item.id: item.meta["facts"] for item in items}
        self.known = {item.id: item.meta["known"] for item in items}
        self.calls = 0

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        for request in requests:
            self.calls += 1
            yield Completion(request.id, 0, f" {self._answer(request)}", 2, "stop")

    def _answer(self, request: Request) -> str:
        image_id, view = request.id.split("#")[0], request.id.split("/")[-2]
        question, *options = request.prompt.split("Question: ")[1].split("\n")
        key = question.removeprefix("What is the ").removesuffix("?")
        value = self.known[image_id].get(key)
        if value is None and view in ("visual", "open"):
            value = self.facts[image_id].get(key)
        if value is None:
            return "unknown"
        return next((option[0] for option in options if text_key(option[2:]) == text_key(value)), value)


@pytest.fixture
def profile():
    return load_profile("smoke", {"images.num_images": 10})


@pytest.fixture
def models(profile, monkeypatch):
    items = list(open_images(profile))
    writer, reader = FakeWriter(items), FakeReader(items)
    roles = {profile.models.question_writer.path: writer, profile.models.question_filter.path: reader}
    monkeypatch.setattr(pipeline, "open_backend", lambda model, _: roles[model.path])
    return writer, reader


def test_from_images_to_parquet(profile, models):
    job = pipeline.open_job(profile)
    record = pipeline.curate(job)
    values = record["values"]
    assert values["images_read"] == values["images_written_about"] == values["images_kept"] == 10
    assert values["questions_extracted"] == values["questions_asked_for"] == 50
    truth = values["truth"]
    assert truth["leaking"] > 0
    assert truth["leaking_removed"] == truth["sound_kept"] == truth["precision"] == 1.0
    rows = list(read_qa(job.run.folder / "qa.parquet"))
    assert [row.id for row in rows] == [item.id for item in open_images(profile)]
    assert sum(len(row.questions) for row in rows) == values["questions_kept"]
    table = pq.read_table(job.run.folder / "questions.parquet").to_pylist()
    leaking = [row for row in table if row["truth"] == "leaking"]
    assert all(row["text_accuracy"] == 1.0 and row["verdict"] != "kept" for row in leaking)
    asked, calls = len(models[0].asked), models[1].calls
    assert pipeline.curate(pipeline.open_job(profile))["values"] == values
    assert (len(models[0].asked), models[1].calls) == (asked, calls)  # a complete run asks nothing again


def test_the_command_prints_the_funnel(models, monkeypatch):
    monkeypatch.setenv(SET_ENV, "")
    some = ["--set", "images.num_images=10", "--as-they-are"]
    done = CliRunner().invoke(app, ["curate", "--profile", "smoke", *some])
    assert done.exit_code == 0, done.output
    assert "50 questions asked for" in done.output and "10 images with kept questions: " in done.output


def test_failed_rows_are_listed_and_tried_again(profile, models):
    writer, _ = models
    writer.broken = {"rl-chart-000000", "rl-scene-000001"}
    job = pipeline.open_job(profile)
    pipeline.check_images(job)
    pipeline.write_questions(job)
    failed = json.loads((job.run.folder / "generated.failed.json").read_text())
    assert failed == dict.fromkeys(sorted(writer.broken), "server is down")
    job.run.close()
    writer.broken, writer.asked = set(), []
    job = pipeline.open_job(profile)
    pipeline.write_questions(job)
    assert sorted(writer.asked) == ["rl-chart-000000", "rl-scene-000001"]
    assert len(job.rows(pipeline.WRITTEN)) == 10
    assert json.loads((job.run.folder / "generated.failed.json").read_text()) == {}


def test_too_many_failures_stop_the_stage(profile, models):
    models[0].broken = set(models[0].meta)
    job = pipeline.open_job(profile)
    pipeline.check_images(job)
    with pytest.raises(UserError, match=r"max_bad_share.*'rl-chart-000000'.*generated\.jsonl"):
        pipeline.write_questions(job)


def test_answers_do_not_depend_on_where_a_run_stopped(profile, models):
    whole = pipeline.open_job(profile, name="whole")
    pipeline.curate(whole)
    expected = {row.id: row for row in whole.rows(pipeline.ANSWERED).read(QuestionSet)}
    job = pipeline.open_job(profile, name="stopped")
    pipeline.check_images(job)
    pipeline.write_questions(job)
    pipeline.extract_questions(job)
    _, reader = models
    stream = reader.stream

    def stops(requests, sampling):
        for number, completion in enumerate(stream(requests, sampling)):
            if number == 100:
                raise KeyboardInterrupt
            yield completion

    reader.stream = stops
    with pytest.raises(KeyboardInterrupt):
        pipeline.answer_questions(job)
    assert 0 < len(job.rows(pipeline.ANSWERED)) < 10
    job.run.close()
    reader.stream = stream
    job = pipeline.open_job(profile, name="stopped")
    pipeline.curate(job)
    assert {row.id: row for row in job.rows(pipeline.ANSWERED).read(QuestionSet)} == expected


def test_the_filter_is_asked_as_released():
    """For the letter alone, and with the image it may say that no option is right, which is a wrong answer."""
    question = Question(question="Which?", options=("a", "b", "c", "d"), answer="A", number=1)
    asked = list(pipeline.requests_about("i", [question], Image.new("RGB", (9, 9)), None, 1, 0, authors=True))
    seen, guessed, bare = asked
    assert seen.prompt.endswith("E) None of the above. Answer the question with only the correct letter")
    assert "None of" not in guessed.prompt and guessed.image is None and seen.prefill == guessed.prefill == ""
    said = {r.id: Completion(r.id, 0, "a" if r is bare else "E", 1, "stop") for r in asked}
    found = pipeline.with_answers("i", question, said, 1, 0, authors=True)
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
    monkeypatch.setattr(pipeline, "open_backend", lambda *_: FakeWriter([]))
    with (
        pipeline.open_job(profile).run,
        pytest.raises(UserError, match=r"2 of 3 .*; row 'b.png': cannot be read|'a.png"),
    ):
        pipeline.check_images(pipeline.open_job(profile))
    closed.clear()
    job = pipeline.open_job(profile)
    pipeline.check_images(job)
    reasons = {row["id"]: row["reason"] for row in job.rows(pipeline.CHECKED).read()}
    assert reasons == {"a.png": None, "b.png": None, "a.png (a.png)": "id used by an earlier image"}
    assert [item.id for item in job.good_images()] == ["a.png", "b.png"]


def test_the_recipe_covers_what_makes_the_questions_and_nothing_that_shows_or_moves_them():
    assert code_hashes(pipeline.RECIPE).keys() == set(pipeline.RECIPE)  # all are there
    assert {"caprl_utils.curation.extract", "caprl_utils.models.local"} <= set(pipeline.RECIPE)
    kinds = ("story", "reports", "endpoint", "client", "progress", "server", "notebook")
    assert not [name for name in pipeline.RECIPE if any(kind in name for kind in kinds)]
