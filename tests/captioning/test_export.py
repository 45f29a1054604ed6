"""Exports can be read by the tools they are for; samples are seeded and nested; released files are read."""

import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scripted_captioner import LOOP, Scripted, fill

from caprl_utils.backends.base import Sampling
from caprl_utils.captioning import export
from caprl_utils.captioning.job import caption_source
from caprl_utils.curation.sources import read_source
from caprl_utils.errors import UserError

IMAGES = 9


@pytest.fixture
def images(tmp_path):
    return fill(tmp_path / "images", IMAGES)


@pytest.fixture
def captions(images, tmp_path):
    bad = {"p002.png": [(LOOP, "length")]}
    out = tmp_path / "captions.parquet"
    caption_source(images, out, Scripted(bad=bad), Sampling(16), shard_images=4, retries=0)
    return out


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_llamafactory_names_the_files_of_a_folder(captions, images, tmp_path):
    file = tmp_path / "train.jsonl"
    assert export.write_llamafactory(captions, file) == IMAGES - 1
    rows = lines(file)
    assert rows[0] == {
        "messages": [
            {"role": "user", "content": "<image>Please describe this image in detail."},
            {"role": "assistant", "content": "p000.png 0 0"},
        ],
        "images": [str(images / "p000.png")],
    }
    assert not any(row["images"][0].endswith("p002.png") for row in rows)
    assert export.write_llamafactory(captions, file, sound_only=False) == IMAGES
    columns = export.dataset_info(file)["columns"]
    assert set(columns.values()) == set(rows[0])


@pytest.mark.parametrize("kind", ["parquet", "rendered"])
def test_images_that_are_no_files_are_written(images, tmp_path, kind):
    data = [file.read_bytes() for file in sorted(images.iterdir())]
    pq.write_table(pa.table({"image": data}), tmp_path / "source.parquet", row_group_size=2)
    source = tmp_path / "source.parquet" if kind == "parquet" else f"mini-world:rl:{IMAGES}"
    caption_source(source, tmp_path / "set", Scripted(), Sampling(16), shard_images=4)
    assert export.write_llamafactory(tmp_path / "set", tmp_path / "train" / "train.jsonl") == IMAGES
    files = [row["images"][0] for row in lines(tmp_path / "train" / "train.jsonl")]
    assert len(set(files)) == IMAGES
    with Image.open(files[-1]) as image:
        image.load()


def test_webdataset_can_be_captioned_again(captions, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TAR_IMAGES", 5)
    tars = export.write_webdataset(captions, tmp_path / "tars", sound_only=False)
    assert [tar.name for tar in tars] == ["captions-000000.tar", "captions-000001.tar"]
    assert len(list(read_source(str(tmp_path / "tars")))) == IMAGES
    with tarfile.open(tars[0]) as archive:
        names = archive.getnames()
        key = names[0].partition(".")[0]
        assert names[:3] == [f"{key}.png", f"{key}.txt", f"{key}.json"]
        assert archive.extractfile(names[1]).read() == b"p000.png 0 0"


def test_captions_of_another_job_are_refused(captions, tmp_path):
    table = pq.read_table(captions)
    pq.write_table(table.take([3, 1]), tmp_path / "turned.parquet")
    with pytest.raises(UserError, match=r"not in its order: image p001\.png"):
        export.write_webdataset(
            tmp_path / "turned.parquet", tmp_path / "t", tmp_path / "captions.parquet.work"
        )
    with pytest.raises(UserError, match="its job's folder is not beside it"):
        export.write_llamafactory(tmp_path / "turned.parquet", tmp_path / "x.jsonl")


def test_samples_are_seeded_nested_and_in_order(captions, tmp_path):
    def drawn(n, seed):
        out = tmp_path / f"sample-{n}-{seed}.parquet"
        assert export.sample(captions, out, n, seed) == n
        return [row["image_id"] for row in export.read_captions(out)]

    assert drawn(5, 0) == sorted(drawn(5, 0)) == drawn(5, 0)
    assert set(drawn(3, 0)) < set(drawn(5, 0))
    assert drawn(5, 0) != drawn(5, 1)
    assert export.write_llamafactory(
        tmp_path / "sample-5-0.parquet", tmp_path / "s.jsonl", tmp_path / "captions.parquet.work", sound_only=False
    ) == 5  # fmt: skip
    with pytest.raises(UserError, match="has 9 images, fewer than the 10 asked for"):
        export.sample(captions, tmp_path / "x.parquet", 10)


@pytest.mark.parametrize(
    "row",
    [
        {"image": "coco/1.jpg", "caption": "A cat."},
        {"image_path": "coco/1.jpg", "response": "A cat."},
        {"image": "coco/1.jpg", "conversations": [
            {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A cat."}]},
        {"images": ["coco/1.jpg"], "messages": [
            {"role": "user", "content": "<image>"}, {"role": "assistant", "content": "A cat."}]},
    ],
)  # fmt: skip
def test_released_files_are_read(tmp_path, row):
    file = tmp_path / "caprl.jsonl"
    file.write_text(f"{json.dumps(row)}\n\n{json.dumps(row)}\n")
    assert list(export.read_released(file)) == [export.ReleasedCaption("coco/1.jpg", "A cat.")] * 2
    assert len(list(export.read_released(file, limit=1))) == 1


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"video": "a.mp4", "caption": "x"}', "its keys: video, caption"),
        ("{oops", "no JSON object"),
        ("3", "no"),
    ],
)
def test_other_files_are_refused_with_their_keys(tmp_path, line, message):
    file = tmp_path / "x.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        list(export.read_released(file))
