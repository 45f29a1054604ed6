"""Caption sets with a scripted captioner: every source, resume, claims, loops, what is set aside."""

import json
import multiprocessing
import os
import signal
import tarfile
import time
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scripted_captioner import LOOP, Scripted, fill, picture

from caprl_utils.captions.job import WORK_SUFFIX, caption_source, make_job, prepare
from caprl_utils.captions.work import SetRow
from caprl_utils.errors import UserError
from caprl_utils.models.base import Sampling
from caprl_utils.schema import ModelConfig

SAMPLING = Sampling(max_tokens=16, temperature=1.0, n=2, seed=3)
IMAGES = 11


@pytest.fixture
def images(tmp_path):
    return fill(tmp_path / "images", IMAGES)


def caption(images, out, captioner=None, sampling=SAMPLING, **settings):
    settings = {"shard_images": 4} | settings
    return caption_source(images, out, captioner or Scripted(), sampling, **settings)


def rows(result):
    return [SetRow(**row) for file in result.captions for row in pq.read_table(file).to_pylist()]


def test_a_folder_becomes_one_file(images, tmp_path):
    result = caption(images, tmp_path / "captions.parquet")
    found = rows(result)
    assert [row.id for row in found] == [f"p{n:03d}.png#{i}" for n in range(IMAGES) for i in (0, 1)]
    assert found[3].caption == "p001.png 1 3" and found[3].image_key == "p001.png" and found[3].seed == 3
    assert (result.images, result.num_captions, result.num_tokens) == (IMAGES, 22, 110)
    assert result.set_aside == {} and result.report.good == IMAGES
    record = json.loads((tmp_path / "captions.parquet.work" / "result.json").read_text())
    assert record["num_captions"] == 22


def test_a_folder_of_shards(images, tmp_path):
    result = caption(images, tmp_path / "set")
    assert [file.name for file in result.captions] == ["00000.parquet", "00001.parquet", "00002.parquet"]
    assert pq.read_table(tmp_path / "set" / "shards").num_rows == 22


def as_parquet(images, folder):
    folder.mkdir()
    data = [file.read_bytes() for file in sorted(images.iterdir())]
    table = pa.table({"image": data, "id": [f"row{n}" for n in range(len(data))]})
    pq.write_table(table.slice(0, 6), folder / "a.parquet", row_group_size=4)
    pq.write_table(table.slice(6), folder / "b.parquet", row_group_size=2)


def as_tar(images, folder):
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as archive:
        for file in sorted(images.iterdir()):
            archive.add(file, file.name)


def as_data_set(images, folder):
    import datasets

    data = [{"bytes": file.read_bytes(), "path": None} for file in sorted(images.iterdir())]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": data}, features=features).save_to_disk(folder)


@pytest.mark.parametrize(
    "write, key", [(as_parquet, "b.parquet#4"), (as_tar, "0.tar#p010.png"), (as_data_set, "#10")]
)
def test_every_source(images, tmp_path, write, key):
    write(images, tmp_path / "source")
    result = caption(tmp_path / "source", tmp_path / "captions.parquet")
    assert result.images == IMAGES
    assert rows(result)[-1].image_key == key


def test_a_list_of_paths(images, tmp_path):
    file = tmp_path / "list.csv"
    file.write_text("image\n" + "".join(f"images/{name}.png\n" for name in ("p004", "p001", "none")))
    result = caption(file, tmp_path / "captions.parquet")
    assert [row.image_key for row in rows(result)[::2]] == ["images/p004.png", "images/p001.png"]
    assert result.report.problems == {"cannot be read": 1}
    (tmp_path / "list.txt").write_text("../secret.png\n")
    with pytest.raises(UserError, match="1 path outside the root"):
        caption(tmp_path / "list.txt", tmp_path / "other.parquet")


def test_rendered_images(tmp_path):
    result = caption("mini-world:rl:3", tmp_path / "captions.parquet")
    assert result.images == 3
    with pytest.raises(UserError, match="mini-world:SPLIT:COUNT"):
        caption("mini-world:rl", tmp_path / "other.parquet")


@pytest.mark.parametrize("after", [0, 1, 4, 9])
def test_a_stopped_job_ends_with_the_same_file_and_captions_nothing_twice(images, tmp_path, after):
    whole = rows(caption(images, tmp_path / "whole.parquet"))
    out = tmp_path / "captions.parquet"
    first, second = Scripted(die_after=2 * after), Scripted()
    with pytest.raises(KeyboardInterrupt):
        caption(images, out, first)
    assert not out.exists()
    assert rows(caption(images, out, second)) == whole
    assert len(first.asked) + len(second.asked) == 2 * IMAGES
    again = Scripted()
    assert rows(caption(images, out, again)) == whole
    assert again.asked == []


def test_loops_and_cut_captions_are_tried_again(images, tmp_path):
    bad = {
        "p001.png": [(LOOP, "length"), ("good", "stop")],
        "p002.png": [("cut", "length"), (LOOP, "stop"), ("cut again", "length")],
        "p003.png": [(LOOP, "stop"), ("cut", "length"), ("good at last", "stop")],
    }
    result = caption(images, tmp_path / "c.parquet", Scripted(bad=bad), replace(SAMPLING, n=1))
    found = {row.image_id: row for row in rows(result)}
    assert (found["p001.png"].caption, found["p001.png"].attempts) == ("good", 2)
    assert found["p001.png"].seed != SAMPLING.seed
    assert (found["p002.png"].caption, found["p002.png"].attempts) == ("cut", 3)
    assert (found["p003.png"].caption, found["p003.png"].looped) == ("good at last", False)
    assert (result.cut, result.looped, result.retried, result.mended) == (1, 0, 3, 2)


def test_without_retries_they_are_counted(images, tmp_path):
    bad = {"p001.png": [(LOOP, "length")], "p002.png": [("cut", "length")]}
    result = caption(images, tmp_path / "c.parquet", Scripted(bad=bad), replace(SAMPLING, n=1), retries=0)
    assert (result.cut, result.looped, result.retried) == (2, 1, 0)


def test_bad_images_are_set_aside_before_captioning(images, tmp_path):
    (images / "empty.png").write_bytes(b"")
    (images / "text.png").write_text("no image")
    (images / "twice.png").write_bytes((images / "p000.png").read_bytes())
    captioner = Scripted()
    result = caption(images, tmp_path / "c.parquet", captioner, skip_duplicates=True)
    assert result.report.problems == {"empty file": 1, "not an image": 1}
    assert result.report.duplicates == 1
    assert result.images == IMAGES and "twice.png" not in captioner.asked
    assert caption(images, tmp_path / "d.parquet").images == IMAGES + 1


def test_an_id_used_twice_is_set_aside(images, tmp_path):
    data = [(images / f"p00{n}.png").read_bytes() for n in range(3)]
    pq.write_table(pa.table({"image": data, "id": ["a", "b", "a"]}), tmp_path / "s.parquet")
    result = caption(tmp_path / "s.parquet", tmp_path / "c.parquet")
    assert result.report.problems == {"id used by an earlier image": 1}
    assert [row.image_id for row in rows(result)] == ["a", "a", "b", "b"]


def test_failed_images_are_named_and_tried_again_by_the_next_run(images, tmp_path):
    out = tmp_path / "c.parquet"
    result = caption(images, out, Scripted(broken=["p001.png", "p009.png"]))
    assert result.set_aside == {"p001.png": "server said no", "p009.png": "server said no"}
    again = Scripted()
    result = caption(images, out, again)
    assert result.set_aside == {} and result.images == IMAGES
    assert sorted(again.asked) == ["p001.png"] * 2 + ["p009.png"] * 2
    assert rows(result) == rows(caption(images, tmp_path / "whole.parquet"))


def test_a_dead_captioner_stops_the_job(images, tmp_path):
    everything = [file.name for file in images.iterdir()]
    with pytest.raises(
        UserError, match=r"none of the first 4 images was captioned; p000.png: server said no"
    ):
        caption(images, tmp_path / "c.parquet", Scripted(broken=everything))
    assert caption(images, tmp_path / "c.parquet").images == IMAGES


def test_a_job_that_captioned_nothing_gives_way_to_another(images, tmp_path):
    out, none = tmp_path / "c.parquet", ModelConfig(path="nobody/nothing")
    job = make_job(str(images), none, Sampling(max_tokens=8), "endpoint")
    prepare(job, out.with_name(out.name + WORK_SUFFIX))
    assert caption(images, out).images == IMAGES


def test_other_settings_and_changed_images_are_refused(images, tmp_path):
    out = tmp_path / "c.parquet"
    caption(images, out)
    with pytest.raises(UserError, match=r"made otherwise .prompt: .*now 'Say it.'"):
        caption(images, out, prompt="Say it.")
    other = Scripted()
    other.model_hash = "ba7"
    with pytest.raises(UserError, match="model_hash"):
        caption(images, out, other)
    picture(99).save(images / "new.png")
    with pytest.raises(UserError, match="has changed since it was checked"):
        caption(images, out)


def test_sources_that_cannot_be_captioned_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no .*nowhere"):
        caption("/nowhere/images", tmp_path / "a.parquet")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"no image .* can be used: .*1 empty file"):
        caption(tmp_path / "bad", tmp_path / "b.parquet")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty .thesis.txt is there"):
        caption(fill(tmp_path / "images", 2), tmp_path / "full")


def test_a_damaged_shard_is_named(images, tmp_path):
    out = tmp_path / "c.parquet"
    caption(images, out)
    shard = tmp_path / "c.parquet.work" / "shards" / "00001.parquet"
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(UserError, match=r"00001.parquet is half-written or damaged"):
        caption(images, out)
    shard.unlink()
    captioner = Scripted()
    assert caption(images, out, captioner).images == IMAGES and len(captioner.asked) == 8


@pytest.mark.parametrize("again", ["gather", "reopen"])
def test_a_shard_damaged_in_the_middle_is_named(images, tmp_path, again):
    """Its footer is sound: only the checksum of a page tells."""
    out = tmp_path / "c.parquet"
    caption(images, out, Scripted(broken=["p005.png"]) if again == "reopen" else None)
    shard = tmp_path / "c.parquet.work" / "shards" / "00001.parquet"
    data, group = shard.read_bytes(), pq.ParquetFile(shard).metadata.row_group(0)
    for column in (group.column(number) for number in range(group.num_columns)):
        start = column.dictionary_page_offset or column.data_page_offset
        place = start + column.total_compressed_size - 2  # in the values of the last page
        shard.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        pq.ParquetFile(shard)
        with pytest.raises(UserError, match=r"00001.parquet is half-written or damaged .* delete it and run"):
            caption(images, out)


def test_a_result_among_the_images_is_refused_at_once(images, tmp_path):
    for out in (images / "captions.parquet", images / "set", images / "deep" / "set", images):
        with pytest.raises(UserError, match=r"would stand inside the image folder .*name a place outside"):
            caption(images, out)
    assert len(list(images.iterdir())) == IMAGES


class Slow(Scripted):
    """Takes its time, and notes in a file what it was asked."""

    def __init__(self, log, sec):
        super().__init__()
        self.log, self.sec = log, sec

    def _one(self, request, index, sampling):
        time.sleep(self.sec)
        with open(self.log, "a") as file:
            file.write(f"{request.id}#{index}\n")
        return super()._one(request, index, sampling)


def _in_process(images, out, log, sec):
    caption(images, out, Slow(log, sec), shard_images=2)


def start(*arguments):
    process = multiprocessing.get_context("fork").Process(target=_in_process, args=arguments)
    process.start()
    return process


def test_kill_9_loses_nothing_and_captions_at_most_what_was_in_flight_twice(images, tmp_path):
    whole = rows(caption(images, tmp_path / "whole.parquet", shard_images=2))
    out, log = tmp_path / "c.parquet", tmp_path / "asked.txt"
    log.write_text("")
    kills = 0
    for count in (1, 5, 8, 14, 19):
        process = start(images, out, log, 0.02)
        while process.is_alive() and len(log.read_text().splitlines()) < count:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert rows(caption(images, out, shard_images=2)) == whole
    assert kills >= 4
    asked = log.read_text().splitlines()
    assert len(asked) - len(set(asked)) <= kills


def test_two_processes_share_a_manifest_without_overlap(images, tmp_path):
    whole = rows(caption(images, tmp_path / "whole.parquet", shard_images=2))
    out, logs = tmp_path / "c.parquet", [tmp_path / "a.txt", tmp_path / "b.txt"]
    processes = [start(images, out, log, 0.02) for log in logs]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    first, second = (log.read_text().splitlines() for log in logs)
    assert first and second and not set(first) & set(second)
    assert sorted(first + second) == sorted(row.id for row in whole)
    assert rows(caption(images, out, shard_images=2)) == whole
