"""Exports can be read by the tools they are for; samples are seeded and nested; released files; the commands."""

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from caprl_utils.__main__ import app
from caprl_utils.captions import export
from caprl_utils.captions.job import caption_source
from caprl_utils.errors import UserError
from caprl_utils.images import open_image
from caprl_utils.models.base import Sampling
from caprl_utils.pretraining.data import read_rows
from tests.captions.scripted_captioner import LOOP, Scripted, fill, picture
from tests.models.fake_server import FakeServer

IMAGES = 9


@pytest.fixture
def images(tmp_path):
    return fill(tmp_path / "images", IMAGES)


@pytest.fixture
def captions(images, tmp_path):
    out = tmp_path / "captions.parquet"
    caption_source(images, out, Scripted(said={"p002.png": (LOOP, "length")}), Sampling(16))
    return out


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_training_data_names_the_files_of_a_folder(captions, images, tmp_path):
    file = tmp_path / "data" / "train.jsonl"
    written = export.write_llamafactory(captions, file)
    assert written == [f"8 rows, image paths below {images} (media_dir)", "left out: 1, cut or loops"]
    first = read_rows(file)[0]
    assert [turn.content for turn in first.messages] == ["<image>Please describe this image in detail.",
                                                         next(export.read_captions(captions))["caption"]]  # fmt: skip
    assert (first.id, first.images) == ("p000.png#0", ("p000.png",))
    assert not any(example.images == ("p002.png",) for example in read_rows(file))
    assert export.write_llamafactory(captions, file, sound_only=False)[0].startswith("9 rows")
    entry = json.loads((file.parent / "dataset_info.json").read_text())["train"]
    assert entry["file_name"] == file.name and entry["formatting"] == "sharegpt"
    assert set(entry["columns"].values()) < set(lines(file)[0])


@pytest.mark.parametrize("kind", ["parquet", "drawn", "list"])
def test_images_that_are_no_files_of_their_own_are_written(images, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(export, "_JOIN_ROWS", 4)  # several passes over the source
    data = [file.read_bytes() for file in sorted(images.iterdir())]
    pq.write_table(pa.table({"image": data}), tmp_path / "source.parquet", row_group_size=2)
    (tmp_path / "list.txt").write_text("".join(f"images/p00{n}.png\n" for n in (3, 1)))
    source, count = {
        "parquet": (tmp_path / "source.parquet", IMAGES), "drawn": (f"mini-world:rl:{IMAGES}", IMAGES),
        "list": (tmp_path / "list.txt", 2),
    }[kind]  # fmt: skip
    caption_source(source, tmp_path / "set.parquet", Scripted(), Sampling(16))
    file = tmp_path / "train" / "train.jsonl"
    written = export.write_llamafactory(tmp_path / "set.parquet", file)
    files = [example.images[0] for example in read_rows(file)]
    assert len(set(files)) == len(files) == count
    if kind == "list":
        assert files == ["images/p003.png", "images/p001.png"] and f"below {tmp_path} " in written[0]
    else:
        assert files[0].startswith("images/train/")
        with Image.open(file.parent / files[-1]) as image:
            image.load()


def test_training_pictures_are_those_that_were_captioned(tmp_path):
    """LLaMA-Factory opens files as they are: what is to be turned, transparent or deep is written anew."""
    folder, exif = fill(tmp_path / "images", 1), Image.Exif()
    exif[0x0112] = 6
    picture(1).save(folder / "turned.jpg", exif=exif)
    Image.new("RGBA", (30, 20), (0, 0, 0, 0)).save(folder / "clear.png")
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(folder / "deep.png")
    caption_source(folder, tmp_path / "set.parquet", Scripted(), Sampling(16))
    export.write_llamafactory(tmp_path / "set.parquet", tmp_path / "train.jsonl")
    shown = {row["id"]: folder / row["images"][0] for row in lines(tmp_path / "train.jsonl")}
    assert shown["p000.png#0"] == folder / "p000.png"
    for name in ("turned.jpg", "clear.png", "deep.png"):
        with Image.open(shown[f"{name}#0"]) as seen:
            wanted = open_image((folder / name).read_bytes())
            assert np.array_equal(np.asarray(seen), np.asarray(wanted))
    again = caption_source(folder, tmp_path / "set.parquet", Scripted(), Sampling(16))
    assert again.images == 4  # the written pictures are no part of the source


def test_captions_that_the_trainer_would_trip_over_are_set_aside(images, tmp_path):
    said = {f"p00{n}.png": (text, "stop") for n, text in enumerate(("A <video> tag.", "<image>"))}
    caption_source(images, tmp_path / "set.parquet", Scripted(said=said), Sampling(16))
    (images / "p004.png").unlink()
    file = tmp_path / "train.jsonl"
    with pytest.raises(UserError, match=r"(?s)6 rows, .*set aside: 1, .*<image>.*--max-bad-share"):
        export.write_llamafactory(tmp_path / "set.parquet", file)
    assert not file.exists() and not list(tmp_path.glob(".*.tmp"))
    written = export.write_llamafactory(tmp_path / "set.parquet", file, max_bad_share=0.5)
    tagged = [f"set aside: 1, the caption holds <{tag}>, which LLaMA-Factory takes for a file"
              for tag in ("image", "video")]  # fmt: skip
    assert written[2:] == [f"set aside: 1, {export.MISSING}", *tagged]
    assert len(read_rows(file)) == IMAGES - 3
    with pytest.raises(UserError, match="the prompt holds <audio>"):
        export.write_llamafactory(tmp_path / "set.parquet", file, prompt="<audio> Describe.")


def test_sets_that_do_not_say_where_their_images_are_or_lost_them_are_refused(captions, tmp_path):
    pq.write_table(pq.read_table(captions).replace_schema_metadata(None), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="does not say what made it"):
        export.write_llamafactory(tmp_path / "other.parquet", tmp_path / "x.jsonl")
    data = [(tmp_path / "images" / f"p00{n}.png").read_bytes() for n in range(3)]
    pq.write_table(pa.table({"image": data}), tmp_path / "source.parquet")
    caption_source(tmp_path / "source.parquet", tmp_path / "set.parquet", Scripted(), Sampling(16))
    pq.write_table(pa.table({"image": data[:2]}), tmp_path / "source.parquet")
    written = export.write_llamafactory(tmp_path / "set.parquet", tmp_path / "x.jsonl", max_bad_share=0.5)
    assert written[0].startswith("2 rows") and written[2:] == [f"set aside: 1, {export.MISSING}"]


def test_samples_are_seeded_nested_in_order_and_of_whole_images(captions, images, tmp_path):
    def drawn(n, seed):
        out = tmp_path / f"sample-{n}-{seed}.parquet"
        assert export.sample(captions, out, n, seed) == n
        return [row["image_id"] for row in export.read_captions(out)]

    assert drawn(5, 0) == sorted(drawn(5, 0)) == drawn(5, 0)
    assert set(drawn(3, 0)) < set(drawn(5, 0))
    assert drawn(5, 0) != drawn(5, 1)
    export.write_llamafactory(tmp_path / "sample-5-0.parquet", tmp_path / "s.jsonl", sound_only=False)
    assert len(lines(tmp_path / "s.jsonl")) == 5
    with pytest.raises(UserError, match="has 9 images, fewer than the 10 asked for"):
        export.sample(captions, tmp_path / "x.parquet", 10)
    caption_source(images, tmp_path / "two.parquet", Scripted(), Sampling(16, n=2))
    assert export.sample(tmp_path / "two.parquet", tmp_path / "s.parquet", 4) == 8
    assert [row["index"] for row in export.read_captions(tmp_path / "s.parquet")] == [0, 1] * 4


def test_a_damaged_set_is_named(captions, tmp_path):
    """Cut short, or one byte turned in any column: the footer is sound, only the checksum of a page tells."""
    data, group = captions.read_bytes(), pq.ParquetFile(captions).metadata.row_group(0)
    captions.write_bytes(data[:60])
    with pytest.raises(UserError, match=r"captions\.parquet is half-written or damaged .* fetch it again"):
        export.sample(captions, tmp_path / "s.parquet", 2)
    for column in (group.column(number) for number in range(group.num_columns)):
        start = column.dictionary_page_offset or column.data_page_offset
        place = start + column.total_compressed_size - 2  # in the values of the last page
        captions.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(UserError, match=r"captions\.parquet is half-written or damaged"):
            list(export.read_captions(captions))


RELEASED = [
    {"image": "coco/1.jpg", "caption": "A cat."},
    {"image_path": "coco/1.jpg", "conversations": [
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A cat."}]},
    {"images": ["coco/1.jpg"], "messages": [
        {"role": "user", "content": "<image>"}, {"role": "assistant", "content": "A cat."}]},
]  # fmt: skip


@pytest.mark.parametrize("row", RELEASED)
def test_released_files_are_read(tmp_path, row):
    file, out = tmp_path / "caprl.jsonl", tmp_path / "r.parquet"
    file.write_text(f"\ufeff{json.dumps(row)}\n\n{json.dumps(row)}\n", encoding="utf-8")
    assert export.write_released([file], out) == ["2 captions"]
    found = list(export.read_captions(out))
    assert [(row["image_id"], row["caption"]) for row in found] == [("coco/1.jpg", "A cat.")] * 2
    assert export.write_released([file], out, limit=1) == ["1 captions"]


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"video": "a.mp4", "caption": "x"}', "its keys: video, caption"),
        (b'{"images": ["a.png", "b.png"], "caption": "x"}', "a caption of several images"),
        (b'{"image": "a.png", "caption": " "}', "the caption is empty"),
        (b"{oops", "no JSON object"), (b"3", "no JSON object"), (b"\x1f\x8b\x08\x00", "no JSON object"),
        (b'{"image": "a.png", "caption": "caf\xe9"}', "no JSON object of a known form, in UTF-8"),
        (b"", "0 lines hold a caption"),
    ],
)  # fmt: skip
def test_other_lines_are_set_aside_with_their_reason(tmp_path, line, message):
    file, out = tmp_path / "x.jsonl", tmp_path / "x.parquet"
    file.write_bytes(line + b"\n")
    with pytest.raises(UserError, match=message):
        export.write_released([file], out)
    assert not out.exists()
    if line:
        file.write_bytes(line + b"\n" + json.dumps(RELEASED[0]).encode() + b"\n")
        told = export.write_released([file], out, max_bad_share=0.5)
        assert told[0] == "1 captions" and "line 1: " in told[1] and message in told[1]


@pytest.fixture
def release(images, tmp_path):
    """A released file: two captions of one image, a loop, an image that is not here."""
    said = [("p000.png", "A cat."), ("p001.png", "A dog."), ("p000.png", "Two."), ("p002.png", LOOP), ("no.png", "x")]
    file = tmp_path / "CapRL-2M.jsonl"
    file.write_text("".join(json.dumps({"image": f"images/{n}", "caption": c}) + "\n" for n, c in said))
    return file


def test_a_release_becomes_our_parquet_and_then_training_data(release, tmp_path):
    out, file = tmp_path / "released.parquet", tmp_path / "train.jsonl"
    assert export.write_released([release], out) == ["5 captions"]
    rows = list(export.read_captions(out))
    assert [row["id"] for row in rows[:3]] == ["images/p000.png#0", "images/p001.png#0", "images/p000.png#1"]
    assert (rows[0]["model"], rows[0]["num_tokens"], rows[0]["finish_reason"]) == (release.name, None, None)
    assert [row["looped"] for row in rows] == [False, False, False, True, False]
    with pytest.raises(UserError, match=r"name the folder that these start at \(--media\)"):
        export.write_llamafactory(out, file)
    written = export.write_llamafactory(out, file, tmp_path, max_bad_share=0.5)
    assert written[1:] == ["left out: 1, cut or loops", f"set aside: 1, {export.MISSING}"]
    assert [example.images[0] for example in read_rows(file)] == [row["image_id"] for row in rows[:3]]
    assert export.sample(out, tmp_path / "sample.parquet", 2) in (2, 3)
    export.write_llamafactory(tmp_path / "sample.parquet", file, tmp_path, max_bad_share=0.9)
    assert len(lines(file)) <= 3


def told(*arguments):
    """(exit status, what was printed, the error) of `caprl ARGUMENTS`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit | UserError):
        raise result.exception
    return result.exit_code, result.output, str(result.exception)


def test_a_folder_is_captioned_by_a_server(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    with FakeServer() as server:
        for _ in range(2):
            status, said, _ = told("caption", images, "--model", "fake", "--base-url", server.url, "--captions", 2)
            assert status == 0 and "18 captions of 9 images" in said and "broken.jpg: not an image" in said
        assert set(server.attempts.values()) == {1}
    assert "written: captions-images.parquet" in said and pq.read_table("captions-images.parquet").num_rows == 18
    status, said, _ = told("caption", images, "--check")
    assert status == 0 and "10 images, 9 good" in said and "set aside: broken.jpg: not an image" in said


def test_errors_of_captioning_are_one_line(images, tmp_path, monkeypatch):
    url, out = "http://127.0.0.1:9/v1", tmp_path / "c.parquet"
    monkeypatch.setattr("caprl_utils.models.endpoint.SILENT_SEC", 0.1)
    assert "127.0.0.1:9" in told("caption", images, "--out", out, "--base-url", url)[2]
    assert "nowhere" in told("caption", tmp_path / "nowhere", "--out", out, "--base-url", url)[2]
    monkeypatch.setitem(sys.modules, "ray", None)
    workers = "--workers", 2, "--max-tokens", 9
    error = told("caption", images, "--out", tmp_path / "d.parquet", "--base-url", url, *workers)[2]
    assert "Ray, which is not installed: `pip install ray`" in error


def test_the_command_exports(captions, release, tmp_path):
    out = tmp_path / "sample.parquet"
    status, said, _ = told("export", captions, "--out", out, "--images", 4, "--seed", 7)
    assert status == 0 and f"4 captions of 4 images\nwritten: {out}" in said and pq.read_table(out).num_rows == 4
    assert "fewer than the 99" in told("export", captions, "--out", out, "--images", 99)[2]
    assert "no captions at" in told("export", tmp_path / "nowhere", "--out", out, "--images", 1)[2]
    assert "must end in .parquet or .jsonl" in told("export", captions, "--out", tmp_path / "x.csv")[2]
    assert "at least 1" in told("export", captions, "--out", out, "--images", 0)[2]
    out = tmp_path / "train.jsonl"
    status, said, _ = told("export", captions, "--out", out, "--media", tmp_path, "--prompt", "Say.")
    assert status == 0 and f"8 rows, image paths below {tmp_path}" in said
    first = read_rows(out)[0]
    assert first.messages[0].content == "<image>Say." and first.images == ("images/p000.png",)
    (tmp_path / "no").mkdir()
    error = told("export", captions, "--out", out, "--media", tmp_path / "no")[2]
    assert "images/p000.png is outside the media folder" in error and read_rows(out)[0] == first
    assert told("export", captions, "--out", out, "--all")[0] == 0 and len(lines(out)) == 9
    status, said, _ = told("export", release, release, "--out", tmp_path / "r.parquet", "--limit", 2)
    assert status == 0 and "4 captions" in said
    status, said, _ = told("export", release, "--out", out, "--media", tmp_path, "--max-bad-share", 0.4)
    assert status == 0 and "3 rows" in said and "set aside: 1, no such image below the media folder" in said
    assert "--media" in told("export", release, "--out", out)[2]
    assert "missing file" in told("export", tmp_path / "no.jsonl", "--out", out, "--media", tmp_path)[2]


def test_an_export_that_fails_leaves_what_was_there(captions, release, tmp_path):
    out, bad = tmp_path / "good.parquet", tmp_path / "bad.jsonl"
    assert told("export", release, "--out", out)[0] == 0
    before = out.read_bytes()
    bad.write_text('{"caption": "no image"}\n')
    assert "0 lines hold a caption that can be used" in told("export", bad, "--out", out)[2]
    assert out.read_bytes() == before
    for source, target, *more in ((release, release), (captions, captions, "--images", 2)):
        assert "is what is read" in told("export", source, "--out", target, *more)[2]
    assert "--images draws" in told("export", release, "--out", tmp_path / "x.jsonl", "--images", 2)[2]
    (tmp_path / "llava.json").write_text("[]")
    assert "name a caption set" in told("export", tmp_path / "llava.json", "--out", out, "--images", 1)[2]
    pq.write_table(pa.table({"name": ["a"]}), tmp_path / "other.parquet")
    assert "written by another tool" in told("export", tmp_path / "other.parquet", "--out", out, "--images", 1)[2]
    (tmp_path / "dataset_info.json").write_text("[]")
    error = told("export", captions, "--out", tmp_path / "y.jsonl", "--media", tmp_path)[2]
    assert "dataset_info.json holds no object" in error
