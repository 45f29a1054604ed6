"""Curation from images to parquet with scripted models: funnel, resume, failures, bad images."""

import json

import pyarrow.parquet as pq
import pytest
from scripted_models import FakeReader, FakeWriter

from caprl_utils.config import load_profile
from caprl_utils.curation import pipeline
from caprl_utils.curation.export import read_qa
from caprl_utils.errors import UserError
from caprl_utils.images import open_images
from caprl_utils.records import Answered, Written


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


def run_all(job):
    for stage in (
        pipeline.check_images,
        pipeline.write_questions,
        pipeline.extract_questions,
        pipeline.answer_questions,
    ):
        stage(job)
    return pipeline.filter_questions(job)


def test_from_images_to_parquet(profile, models):
    job = pipeline.open_job(profile)
    record = run_all(job)
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


def test_a_complete_run_asks_nothing_again(profile, models):
    writer, reader = models
    run_all(pipeline.open_job(profile))
    asked, calls = len(writer.asked), reader.calls
    record = run_all(pipeline.open_job(profile))
    assert (len(writer.asked), reader.calls) == (asked, calls)
    assert record["values"]["questions_kept"] > 0


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
    assert len(list(job.read(pipeline.GENERATED, Written))) == 10
    assert json.loads((job.run.folder / "generated.failed.json").read_text()) == {}


def test_too_many_failures_stop_the_stage(profile, models):
    writer, _ = models
    writer.broken = set(writer.meta)
    job = pipeline.open_job(profile)
    pipeline.check_images(job)
    with pytest.raises(UserError, match="max_bad_share") as error:
        pipeline.write_questions(job)
    assert "rl-chart-000000" in str(error.value)
    assert "generated.jsonl" in str(error.value)


def test_answers_do_not_depend_on_where_a_run_stopped(profile, models):
    whole = pipeline.open_job(profile, name="whole")
    run_all(whole)
    expected = {row.id: row for row in whole.read(pipeline.ANSWERED, Answered)}
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
    run_all(job)
    assert {row.id: row for row in job.read(pipeline.ANSWERED, Answered)} == expected


def test_an_empty_source_is_an_error(tmp_path):
    profile = load_profile("smoke", {"images.source": str(tmp_path)})
    with pytest.raises(UserError, match="no image in"):
        next(open_images(profile))
