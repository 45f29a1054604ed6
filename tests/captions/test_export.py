"""Exports can be read by the tools they are for; samples are seeded and nested; released files are read."""

import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scripted_captioner import LOOP, Scripted, fill

from caprl_utils.captions import llamafactory, released, sets, webdataset
from caprl_utils.captions.export import main
from caprl_utils.captions.job import caption_source
from caprl_utils.errors import UserError
from caprl_utils.images import read_source
from caprl_utils.models.base import Sampling
from caprl_utils.pretraining.data import read_rows

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
    file = tmp_path / "data" / "train.jsonl"
    written = llamafactory.write_llamafactory(captions, file)
    assert (written.rows, written.set_aside, written.media) == (IMAGES - 1, {}, images)
    first = read_rows(file)[0]
    assert [m.content for m in first.messages] == [
        "<image>Please describe this image in detail.",
        "p000.png 0 0",
    ]
    assert first.id == "p000.png#0" and first.images == ("p000.png",)
    assert not any(example.images == ("p002.png",) for example in read_rows(file))
    assert llamafactory.write_llamafactory(captions, file, sound_only=False).rows == IMAGES
    entry = json.loads((file.parent / "dataset_info.json").read_text())["train"]
    assert entry["file_name"] == file.name and entry["formatting"] == "sharegpt"
    assert set(entry["columns"].values()) < set(lines(file)[0])


def test_paths_start_at_the_media_folder(captions, images, tmp_path):
    file = tmp_path / "train.jsonl"
    llamafactory.write_llamafactory(captions, file, media=tmp_path)
    assert read_rows(file)[0].images == ("images/p000.png",)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UserError, match=r"image .*images/p000\.png is outside the media folder .*elsewhere"):
        llamafactory.write_llamafactory(captions, file, media=tmp_path / "elsewhere")
    assert read_rows(file)[0].images == ("images/p000.png",)


@pytest.mark.parametrize("kind", ["parquet", "rendered"])
def test_images_that_are_no_files_are_written(images, tmp_path, kind):
    data = [file.read_bytes() for file in sorted(images.iterdir())]
    pq.write_table(pa.table({"image": data}), tmp_path / "source.parquet", row_group_size=2)
    source = tmp_path / "source.parquet" if kind == "parquet" else f"mini-world:rl:{IMAGES}"
    caption_source(source, tmp_path / "set", Scripted(), Sampling(16), shard_images=4)
    file = tmp_path / "train" / "train.jsonl"
    assert llamafactory.write_llamafactory(tmp_path / "set", file).rows == IMAGES
    files = [example.images[0] for example in read_rows(file)]
    assert len(set(files)) == IMAGES and files[0].startswith("images/train/")
    with Image.open(file.parent / files[-1]) as image:
        image.load()


def test_the_images_of_a_list_are_named(images, tmp_path):
    (tmp_path / "list.txt").write_text("images/p003.png\nimages/p001.png\n")
    caption_source(tmp_path / "list.txt", tmp_path / "set", Scripted(), Sampling(16))
    file = tmp_path / "train.jsonl"
    assert llamafactory.write_llamafactory(tmp_path / "set", file).media == tmp_path
    assert [example.images for example in read_rows(file)] == [("images/p003.png",), ("images/p001.png",)]


def test_captions_that_the_trainer_would_trip_over_are_set_aside(images, tmp_path):
    bad = {f"p00{n}.png": [(text, "stop")] for n, text in enumerate(("A <video> tag.", "<image>", " "))}
    caption_source(images, tmp_path / "set", Scripted(bad=bad), Sampling(16), retries=0)
    (images / "p004.png").unlink()
    file = tmp_path / "train.jsonl"
    with pytest.raises(UserError, match=r"(?s)5 rows, .*set aside: 1, .*<image>.*--max-bad-share"):
        llamafactory.write_llamafactory(tmp_path / "set", file)
    assert not file.exists() and not list(tmp_path.glob(".*.tmp"))
    written = llamafactory.write_llamafactory(tmp_path / "set", file, max_bad_share=0.5)
    tagged = {
        f"the caption holds <{tag}>, which LLaMA-Factory takes for a file": 1 for tag in ("video", "image")
    }
    assert written.set_aside == tagged | {llamafactory.EMPTY: 1, llamafactory.MISSING: 1}
    assert len(read_rows(file)) == written.rows == IMAGES - 4
    with pytest.raises(UserError, match="the prompt holds <audio>"):
        llamafactory.write_llamafactory(tmp_path / "set", file, prompt="<audio> Describe.")


def test_webdataset_can_be_captioned_again(captions, tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "TAR_IMAGES", 5)
    tars = webdataset.write_webdataset(captions, tmp_path / "tars", sound_only=False)
    assert [tar.name for tar in tars] == ["captions-000000.tar", "captions-000001.tar"]
    assert len(list(read_source(str(tmp_path / "tars")))) == IMAGES
    with tarfile.open(tars[0]) as archive:
        names = archive.getnames()
        key = names[0].partition(".")[0]
        assert names[:3] == [f"{key}.png", f"{key}.txt", f"{key}.json"]
        assert archive.extractfile(names[1]).read() == b"p000.png 0 0"


def test_captions_of_another_job_are_refused(captions, tmp_path):
    table, job = pq.read_table(captions), tmp_path / "captions.parquet.work"
    pq.write_table(table.take([3, 1]), tmp_path / "turned.parquet")
    with pytest.raises(UserError, match=r"not in its order: image p001\.png"):
        webdataset.write_webdataset(tmp_path / "turned.parquet", tmp_path / "t", job)
    with pytest.raises(UserError, match="its job's folder is not beside it"):
        llamafactory.write_llamafactory(tmp_path / "turned.parquet", tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=r"images holds no job\.json"):
        webdataset.write_webdataset(tmp_path / "turned.parquet", tmp_path / "t", tmp_path / "images")


def test_samples_are_seeded_nested_and_in_order(captions, tmp_path):
    def drawn(n, seed):
        out = tmp_path / f"sample-{n}-{seed}.parquet"
        assert sets.sample(captions, out, n, seed) == n
        return [row["image_id"] for row in sets.read_captions(out)]

    assert drawn(5, 0) == sorted(drawn(5, 0)) == drawn(5, 0)
    assert set(drawn(3, 0)) < set(drawn(5, 0))
    assert drawn(5, 0) != drawn(5, 1)
    written = llamafactory.write_llamafactory(
        tmp_path / "sample-5-0.parquet", tmp_path / "s.jsonl", job=tmp_path / "captions.parquet.work",
        sound_only=False,
    )  # fmt: skip
    assert written.rows == 5
    with pytest.raises(UserError, match="has 9 images, fewer than the 10 asked for"):
        sets.sample(captions, tmp_path / "x.parquet", 10)


def test_all_captions_of_an_image_are_in_a_sample_or_none(images, tmp_path):
    caption_source(images, tmp_path / "set", Scripted(), Sampling(16, n=2), shard_images=4)
    assert sets.sample(tmp_path / "set", tmp_path / "s.parquet", 4) == 8
    rows = list(sets.read_captions(tmp_path / "s.parquet"))
    assert len({row["image_id"] for row in rows}) == 4 and [row["index"] for row in rows] == [0, 1] * 4


@pytest.mark.parametrize("damage", [lambda data: data[:60], lambda data: data[:300] + b"\0" * 9 + data[309:]])
def test_a_damaged_set_is_named(captions, tmp_path, damage):
    captions.write_bytes(damage(captions.read_bytes()))
    with pytest.raises(UserError, match=r"captions\.parquet is half-written or damaged .* fetch it again"):
        sets.sample(captions, tmp_path / "s.parquet", 2)


RELEASED = [
    {"image": "coco/1.jpg", "caption": "A cat."},
    {"image_path": "coco/1.jpg", "response": "A cat."},
    {"image": "coco/1.jpg", "conversations": [
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A cat."}]},
    {"images": ["coco/1.jpg"], "messages": [
        {"role": "user", "content": "<image>"}, {"role": "assistant", "content": "A cat."}]},
]  # fmt: skip


@pytest.mark.parametrize("row", RELEASED)
def test_released_files_are_read(tmp_path, row):
    file = tmp_path / "caprl.jsonl"
    file.write_text(f"{json.dumps(row)}\n\n{json.dumps(row)}\n")
    assert list(released.read_released(file)) == [released.ReleasedCaption("coco/1.jpg", "A cat.")] * 2
    assert len(list(released.read_released(file, limit=1))) == 1


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
        list(released.read_released(file))
    file.write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(UserError, match="not UTF-8 text"):
        list(released.read_released(file))


@pytest.fixture
def release(images, tmp_path):
    """A released file: two captions of one image, a loop, an image that is not here."""
    said = [
        ("p000.png", "A cat."),
        ("p001.png", "A dog."),
        ("p000.png", "Two."),
        ("p002.png", LOOP),
        ("no.png", "x"),
    ]
    file = tmp_path / "CapRL-2M.jsonl"
    file.write_text("".join(json.dumps({"image": f"images/{n}", "caption": c}) + "\n" for n, c in said))
    return file


def test_a_release_becomes_our_parquet_and_then_training_data(release, tmp_path):
    out, file = tmp_path / "released.parquet", tmp_path / "train.jsonl"
    assert released.write_released([release], out) == 5
    rows = list(sets.read_captions(out))
    assert [row["id"] for row in rows[:3]] == ["images/p000.png#0", "images/p001.png#0", "images/p000.png#1"]
    assert (rows[0]["model"], rows[0]["num_tokens"], rows[0]["finish_reason"]) == (release.name, None, None)
    assert [row["looped"] for row in rows] == [False, False, False, True, False]
    with pytest.raises(UserError, match=r"name the folder of the images \(--media\)"):
        llamafactory.write_llamafactory(out, file)
    with pytest.raises(UserError, match=r"no media folder .*nowhere"):
        llamafactory.write_llamafactory(out, file, tmp_path / "nowhere")
    written = llamafactory.write_llamafactory(out, file, tmp_path, max_bad_share=0.5)
    assert written.set_aside == {llamafactory.MISSING: 1}
    assert [example.images[0] for example in read_rows(file)] == [row["image_id"] for row in rows[:3]]
    assert sets.sample(out, tmp_path / "sample.parquet", 2) in (2, 3)
    again = llamafactory.write_llamafactory(tmp_path / "sample.parquet", file, tmp_path, max_bad_share=0.9)
    assert again.rows <= 3
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.jsonl: no line holds a caption"):
        released.write_released([tmp_path / "empty.jsonl"], out)
    assert len(list(sets.read_captions(out))) == 5


# the command line


def told(capsys, *arguments):
    """(exit status, what was printed) of the command line."""
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_the_command_line_samples(captions, tmp_path, capsys):
    out = tmp_path / "sample.parquet"
    status, said = told(capsys, "sample", captions, "--out", out, "--images", 4, "--seed", 7)
    assert status == 0 and f"4 captions of 4 images, seed 7\nwritten: {out}" in said
    assert pq.read_table(out).num_rows == 4
    assert told(capsys, "sample", captions, "--out", out, "--images", 99)[0] == 1
    status, said = told(capsys, "sample", tmp_path / "nowhere", "--out", out, "--images", 1)
    assert status == 1 and "error: no captions at" in said
    status, said = told(capsys, "sample", captions, "--out", tmp_path / "x.csv", "--images", 1)
    assert status == 1 and "the name must end in .parquet" in said
    with pytest.raises(SystemExit):
        main(["sample", str(captions), "--out", str(out), "--images", "0"])
    assert "'0' is no number above 0" in capsys.readouterr().err


def test_the_command_line_writes_training_data(captions, tmp_path, capsys):
    out = tmp_path / "train.jsonl"
    status, said = told(
        capsys, "llamafactory", captions, "--out", out, "--media", tmp_path, "--prompt", "Say."
    )
    assert status == 0 and f"8 rows, image paths below {tmp_path} (media_dir)\nwritten: {out}" in said
    example = read_rows(out)[0]
    assert example.images == ("images/p000.png",) and example.messages[0].content == "<image>Say."
    assert told(capsys, "llamafactory", captions, "--out", out, "--all")[0] == 0 and len(lines(out)) == 9
    status, said = told(capsys, "llamafactory", captions, "--out", out, "--media", tmp_path / "other")
    assert status == 1 and "p000.png is outside the media folder" in said


def test_the_command_line_writes_tars(captions, tmp_path, capsys):
    status, said = told(capsys, "webdataset", captions, "--out", tmp_path / "tars")
    assert status == 0 and "tar files: 1" in said
    assert len(list(read_source(str(tmp_path / "tars")))) == IMAGES - 1
    captions.rename(tmp_path / "moved.parquet")
    status, said = told(capsys, "webdataset", tmp_path / "moved.parquet", "--out", tmp_path / "more")
    assert status == 1 and "name the folder of the job that made the captions (--job" in said
    job = Path(f"{captions}.work")
    status, _ = told(capsys, "webdataset", tmp_path / "moved.parquet", "--out", tmp_path / "m", "--job", job)
    assert status == 0


def test_the_command_line_reads_a_release(release, tmp_path, capsys):
    out = tmp_path / "r.parquet"
    status, said = told(capsys, "released", release, release, "--out", out, "--limit", 2)
    assert status == 0 and "4 captions" in said and pq.read_table(out).num_rows == 4
    out = tmp_path / "r.jsonl"
    status, said = told(
        capsys, "released", release, "--out", out, "--media", tmp_path, "--max-bad-share", 0.3
    )
    assert status == 0 and "set aside: 1, no such image below the media folder" in said
    assert [example.images[0] for example in read_rows(out)][:2] == ["images/p000.png", "images/p001.png"]
    status, said = told(capsys, "released", release, "--out", out)
    assert status == 1 and "--media" in said
    status, said = told(capsys, "released", tmp_path / "no.jsonl", "--out", out, "--media", tmp_path)
    assert status == 1 and "no caption file" in said
