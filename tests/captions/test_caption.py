"""The one captioner with a scripted model: sources, resume, kills, loops, what is set aside."""

import csv
import io
import json
import multiprocessing
import os
import signal
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from caprl_utils.captions import job as captioning
from caprl_utils.captions import scale
from caprl_utils.captions.caption import CHUNK_IMAGES, Caption, Tally, draw, is_loop
from caprl_utils.captions.job import caption_source, open_captioner
from caprl_utils.errors import UserError
from caprl_utils.hashing import derive_seed
from caprl_utils.images import ImageItem
from caprl_utils.models.base import Sampling
from caprl_utils.prism import evaluate, sources
from caprl_utils.schema import ModelConfig
from tests.captions.scripted_captioner import LOOP, Scripted, asked, fill, picture

SAMPLING = Sampling(max_tokens=16, temperature=1.0, n=2, seed=3)
SEED = derive_seed(3, "captions", 0, bits=31)
IMAGES = 11


def test_a_caption_has_the_seed_of_its_images_place_and_its_code_is_in_the_keys():
    images = [(place, ImageItem("i", Image.new("RGB", (4, 4)).copy)) for place in (5, CHUNK_IMAGES)]
    made = [row for image in images for row in draw([image], Scripted, SAMPLING, "?", Tally())]
    assert made[1].caption == f"i 1 {SEED}" and made[2].seed == derive_seed(3, "captions", 1, bits=31) != SEED
    assert all("caprl_utils.captions.caption" in recipe for recipe in (evaluate.RECIPE, sources.RECIPE))
    beside = ("captions.scale", "captions.export", "models.endpoint", "reports", "progress")
    assert not any(part in name for name in sources.RECIPE for part in beside)


@pytest.fixture
def images(tmp_path):
    return fill(tmp_path / "images", IMAGES)


def caption(images, out, captioner=None, sampling=SAMPLING, **settings):
    return caption_source(images, out, captioner or Scripted(), sampling, **settings)


def rows(result):
    return [Caption(**row) for row in pq.read_table(result.file).to_pylist()]


def test_a_folder_becomes_one_file(images, tmp_path):
    result = caption(images, tmp_path / "captions.parquet")
    found = rows(result)
    assert [row.id for row in found] == [f"p{n:03d}.png#{i}" for n in range(IMAGES) for i in (0, 1)]
    assert found[3].caption == f"p001.png 1 {SEED}" and found[3].image_key == "p001.png"
    assert (result.images, result.captions, result.tokens) == (IMAGES, 22, 110)
    assert json.loads((tmp_path / "captions.parquet.work" / "result.json").read_text())["captions"] == 22


def test_lists_and_drawn_images(images, tmp_path):
    (tmp_path / "list.csv").write_text("image\nimages/p004.png\nimages/p001.png\nimages/none.png\n")
    result = caption(tmp_path / "list.csv", tmp_path / "a.parquet", max_bad_share=0.5)
    assert [row.image_key for row in rows(result)[::2]] == ["images/p004.png", "images/p001.png"]
    assert result.bad == {"images/none.png": "cannot be read (No such file or directory)"}
    assert caption("mini-world:rl:3", tmp_path / "b.parquet").images == 3
    with pytest.raises(UserError, match="mini-world:SPLIT:COUNT"):
        caption("mini-world:rl", tmp_path / "c.parquet")


@pytest.mark.parametrize("kept", [0, 1, 8, 21])
def test_a_stopped_job_ends_with_the_same_file_and_captions_nothing_twice(images, tmp_path, kept):
    """An image of whose captions some are there is asked about again, and keeps those."""
    out, store = tmp_path / "c.parquet", tmp_path / "c.parquet.work" / "captions.jsonl"
    whole = rows(caption(images, out))
    lines = store.read_bytes().splitlines(keepends=True)
    store.write_bytes(b"".join([*lines[:kept], lines[kept][:9]]))  # a kill may leave half a line
    out.unlink()
    second, again = Scripted(), Scripted()
    assert rows(caption(images, out, second)) == whole
    assert len(second.asked) == 2 * (IMAGES - kept // 2)
    assert store.read_bytes().splitlines(keepends=True)[:kept] == lines[:kept]
    assert rows(caption(images, out, again)) == whole and again.asked == []


def test_loops_and_cut_captions_stay_and_are_counted(images, tmp_path):
    said = {"p001.png": (LOOP, "length"), "p002.png": ("cut", "length"), "p003.png": (LOOP, "stop")}
    captioner = Scripted(said=said)
    result = caption(images, tmp_path / "c.parquet", captioner, replace(SAMPLING, n=1))
    first = next(row for row in rows(result) if row.image_id == "p001.png")
    assert (first.caption, first.looped) == (LOOP.strip(), True)
    assert (result.cut, result.looped) == (2, 2) and "cut 2, loops (a phrase 4 times or more) 2" in result.lines()[0]
    assert len(captioner.asked) == IMAGES  # nothing is drawn twice


def test_bad_images_are_set_aside_and_too_many_are_an_error(images, tmp_path):
    (images / "empty.png").write_bytes(b"")
    (images / "text.png").write_text("no image")
    out, listed = tmp_path / "c.parquet", tmp_path / "c.set-aside.csv"
    result = caption(images, out)
    assert result.bad == {"empty.png": "empty file", "text.png": "not an image"} and result.images == IMAGES
    told = "2 of 13 images set aside:", "  empty.png: empty file", "  text.png: not an image"
    assert result.lines()[1:4] == [*told] and str(listed) in result.lines()[4]
    assert listed.read_text().split() == ["image,reason", "empty.png,empty", "file", "text.png,not", "an", "image"]
    with pytest.raises(UserError, match=r"2 images of the first 13 cannot be used; first: empty.png: empty file. All"):
        caption(images, out, max_bad_share=0.1)
    for number in range(70):
        (images / f"a{number:03d}.png").write_text("no image")
    captioner = Scripted()
    with pytest.raises(UserError, match=r"7. images of the first .. cannot be used"):
        caption(images, tmp_path / "d.parquet", captioner)
    assert len(set(captioner.asked)) < IMAGES  # it stops as soon as it is clear
    for file in [*images.glob("a*.png"), images / "empty.png", images / "text.png"]:
        file.unlink()
    assert caption(images, out).bad == {} and not listed.exists()


def jpeg(seed, kind="JPEG", **options):
    buffer = io.BytesIO()
    picture(seed).save(buffer, kind, **options)
    return buffer.getvalue()


AWKWARD = {  # name -> bytes, and why it is set aside
    **{f"empty{n}.png": (b"", "empty file") for n in range(3)},
    **{f"text{n}.jpg": (b"no picture", "not an image") for n in range(3)},
    **{f"cut{n}.jpg": (jpeg(n)[:500], "truncated or corrupt") for n in range(6)},
    **{f"moving{n}.gif": (jpeg(n, "GIF", save_all=True, append_images=[picture(9)]), "animated (2 frames)")
       for n in range(3)},
    **{f"drawing{n}.svg": (b"<svg/>", "not an image (.svg is not opened here") for n in range(3)},
    **{f"phone{n}.heic": (b"\0\0\0\x18ftypheic", "not an image (.heic is not opened here") for n in range(3)},
    **{f"strip{n}.bmp": (1000 + n, "aspect ratio too large") for n in range(3)},
    **{f"gone{n}.png": (None, "cannot be read (No such file or directory)") for n in range(3)},
    **{os.fsdecode(f"caf{n}".encode() + b"\xe9.png"): (jpeg(n), "name that is not UTF-8") for n in range(3)},
}  # fmt: skip


def test_captioning_a_folder_of_30_awkward_files_names_each_one_set_aside_with_its_reason(images, tmp_path):
    for name, (data, _) in AWKWARD.items():
        if data is None:
            (images / name).symlink_to(images / "nothing")
        elif isinstance(data, int):
            Image.new("RGB", (data, 2)).save(images / name)
        else:
            (images / name).write_bytes(data)
    (images / "notes.md").touch()
    result = caption(images, tmp_path / "c.parquet", max_bad_share=0.9)
    assert (len(AWKWARD), result.images, result.looked) == (30, IMAGES, IMAGES + 30)
    with open(result.listed, newline="") as file:
        told = dict(list(csv.reader(file))[1:])
    assert told.keys() == {name.replace("\udce9", "\\udce9") for name in AWKWARD}
    for name, (_, reason) in AWKWARD.items():
        assert told[name.replace("\udce9", "\\udce9")].startswith(reason)
    lines = result.lines()
    assert lines[1] == "30 of 41 images set aside:" and lines[12] == "  and 20 more"
    assert lines[13].endswith(result.listed) and lines[14] == "passed over: 1 .md"


def test_new_images_are_captioned_where_the_folder_is_now_and_a_change_is_told(images, tmp_path, caplog):
    out = tmp_path / "c.parquet"
    caption(images, out)
    (images / ".DS_Store").write_bytes(b"x")
    os.utime(images / "p000.png")
    picture(99).save(images / "new.png")
    (images / "p003.png").unlink()
    with pytest.raises(UserError, match=r"made otherwise .source: "):  # another folder, not a moved one
        caption(fill(tmp_path / "other", 2), out)
    moved, again = images.rename(tmp_path / "moved"), Scripted()
    assert not caplog.text
    result = caption(moved, out, again)
    assert "moved has changed since; captions that are there stay (to caption all anew, delete" in caplog.text
    assert set(again.asked) == {"new.png"} and result.images == IMAGES
    assert {row.image_id for row in rows(result)} == {file.name for file in moved.glob("*.png")}


def test_failed_images_and_empty_captions_are_named_and_tried_again_by_the_next_run(images, tmp_path):
    out = tmp_path / "c.parquet"
    result = caption(images, out, Scripted(broken=["p001.png"], said={"p009.png": (" \n", "stop")}))
    assert result.failed == {"p001.png": "server said no", "p009.png": "the captioner gave no text"}
    told = "2 images not captioned; run again to try them again:", "  p001.png: server said no"
    assert result.lines()[1:3] == [*told] and result.captions == 2 * (IMAGES - 2)
    assert caption(images, out, Scripted(broken=["p001.png"])).failed == {"p001.png": "server said no"}
    again = Scripted()
    result = caption(images, out, again)
    assert result.failed == {} and again.asked == ["p001.png"] * 2
    assert rows(result) == rows(caption(images, tmp_path / "whole.parquet"))


@pytest.mark.parametrize("streamed", [False, True])
def test_workers_write_what_one_process_writes_and_do_nothing_twice(images, tmp_path, monkeypatch, streamed):
    """Without Ray, which the integration tests have: units one after the other. streamed: as a data set of the hub."""
    monkeypatch.setattr(scale, "is_hub", lambda source: streamed)

    def told(actor, units, workers, gpus):
        one = scale._Actor(*actor)
        return (json.loads(told["told"][0].as_py()) for unit in units for told in one(pa.Table.from_pylist([unit])))

    monkeypatch.setattr(scale, "_ray", lambda workers: nullcontext())
    monkeypatch.setattr(scale, "_told", told)
    whole, out = rows(caption(images, tmp_path / "whole.parquet")), tmp_path / "c.parquet"
    for captioner, broken in ((Scripted(broken=["p003.png"]), 1), (Scripted(), 0)):
        made = caption(images, out, captioner, workers=2, shard_images=4)
        assert len(made.failed) == broken and made.captions == 2 * (IMAGES - broken)
    assert sorted(rows(made), key=lambda row: row.id) == whole and captioner.asked == ["p003.png"] * 2


def test_a_small_shard_without_captions_is_no_dead_captioner(images, tmp_path):
    """A worker without Ray: the last shard may hold one image, and that one may be refused."""
    silent = [f"p{number:03d}.png" for number in range(CHUNK_IMAGES + 1)]
    fill(images, CHUNK_IMAGES + 1)
    job = captioning.make_job(images, Scripted(), SAMPLING)
    hashes = np.arange(len(silent), dtype=np.uint64)
    units = scale._units(hashes, hashes[:2], 40, 2)
    assert [unit["numbers"] for unit in units] == [[*range(2, 42)], [*range(42, 65)]]
    for broken, dead in ((["p064.png"], False), (silent, True)):
        scripted = Scripted(broken=broken)
        actor = scale._Actor(job, str(tmp_path / "set"), lambda _, scripted=scripted: scripted, False, 40)
        told = []
        for part in ([64], [*range(30)], [*range(30, 64)]):
            table = pa.Table.from_pylist([{"numbers": part, "again": [], "part": 0, "of": 1}])
            told += [json.loads(one["told"][0].as_py()) for one in actor(table)]
        assert told[0]["failed"] == {"p064.png": "server said no"} and ("error" in told[-1]) == dead


def test_other_settings_are_refused_unless_nothing_is_captioned(images, tmp_path):
    out = tmp_path / "c.parquet"
    with pytest.raises(UserError, match=r"none of 11 images was captioned; p000.png: server said no"):
        caption(images, out, Scripted(broken=[file.name for file in images.iterdir()]), prompt="Say.")
    assert caption(images, out).images == IMAGES
    with pytest.raises(UserError, match=r"made otherwise .prompt: .*now 'Say it.'"):
        caption(images, out, prompt="Say it.")
    other = Scripted()
    other.model_hash = "ba7"
    with pytest.raises(UserError, match="model_hash"):
        caption(images, out, other)
    foreign = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"x": [1]}), foreign)
    with pytest.raises(UserError, match=r"mine.parquet is there, and its .*\.work is not"):
        caption(images, foreign)


def test_sources_and_results_that_cannot_be_are_named(images, tmp_path):
    for name in ("bad/x.png", "full.parquet.work/thesis.txt", "folder.parquet/x", "file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    bad = r"1 images of the first 1 cannot be used; first: x.png: empty file"
    inside = r"would stand inside the image folder .*name a place outside"
    wrong = r"NAME.parquet here, or with --workers"
    for source, out, settings, message in (
        ("/nowhere/images", "a.parquet", {}, r"no .*nowhere"), (tmp_path / "bad", "b.parquet", {}, bad),
        (images, "full.parquet", {}, r"not empty .thesis.txt is there"), (images, "set", {}, wrong),
        (images, "folder.parquet", {}, wrong), (images, "file/c.parquet", {}, "cannot be written"),
        (images, "c.jsonl", {"workers": 1}, wrong), (images, "images/c.parquet", {}, inside),
        (images, "images/deep/c.parquet", {}, inside),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            caption(source, tmp_path / out, **settings)


def _killed(images, out, log):
    caption(images, out, Scripted(log=log, sec=0.02))


def test_ten_kills_lose_nothing_and_caption_at_most_what_was_in_flight_twice(images, tmp_path):
    whole = rows(caption(images, tmp_path / "whole.parquet"))
    out, log = tmp_path / "c.parquet", tmp_path / "asked.txt"
    kills = 0
    for count in range(1, 20, 2):
        process = multiprocessing.get_context("fork").Process(target=_killed, args=(images, out, log))
        process.start()
        while process.is_alive() and len(asked(log)) < count:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert rows(caption(images, out)) == whole
    # an image whose first caption is on disk and whose second is not is asked about as a whole
    assert kills >= 8 and len(asked(log)) - len(set(asked(log))) <= 2 * kills


def test_who_runs_a_model(monkeypatch):
    served = []

    @contextmanager
    def serve(model, options):
        served.append((model.path, options.gpus))
        yield SimpleNamespace(config=url)
        served.append("ended")

    url = ModelConfig(path="m", backend="endpoint", base_urls=["http://x/v1"])
    small = ModelConfig(path="zoo:base")
    monkeypatch.setattr("caprl_utils.models.server.serve", serve)
    for model, engine, names, wanted in [
        (url, None, ["H100"], "EndpointBackend"), (small, None, [], "LocalBackend"),
        (small, "transformers", ["H100"], "LocalBackend"), (small, "vllm", [], "EndpointBackend"),
        (small, None, ["H100"], "EndpointBackend"),
    ]:  # fmt: skip
        monkeypatch.setattr(captioning, "visible_gpus", lambda names=names: names)
        with ExitStack() as stack:
            assert type(open_captioner(model, engine, 2, stack)).__name__ == wanted
    assert served == [("zoo:base", 2), "ended"] * 2


CAPTION = (
    "The chart shows the sales of four cities. Rome has 42, Oslo 17, Lima 30 and Cairo 12. The title is blue. "
    "The bars are green, and a legend stands on the right."
)
LOOPS = [
    CAPTION + " The title is blue." * 12,
    CAPTION + " and the tree and the tree and the tree and the tree and the tree and the tr" * 2,
    "ha" * 200, "一个红色的圆。" * 20, CAPTION + "\n- a red car on the road" * 30 + "\n- a red c",
    " ".join(f"The value of the {n}th bar is 4. The title of it is blue." for n in range(6)),
]  # fmt: skip
SOUND = [
    "", "a", CAPTION, "no no no no", "Left: yes.\nRight: yes.\nTop: yes.\nBottom: yes.\nBack: yes.",
    "| city | sales |\n| --- | --- |\n| Rome | 42 |\n| Oslo | 42 |\n| Lima | 42 |\n| Cairo | 42 |",
    "Row 1: red, red, red, red.\nRow 2: blue, blue, blue, blue.\nRow 3: red, green, red, green.",
]  # fmt: skip


@pytest.mark.parametrize("text", [*LOOPS, *SOUND])
def test_loops_are_told_from_lists_and_tables(text):
    assert is_loop(text) == (text in LOOPS)


@hypothesis_settings(max_examples=25)
@given(st.text(min_size=1, max_size=40).filter(str.strip), st.text(max_size=59))
def test_whatever_is_said_seventy_times_is_a_loop_and_a_short_text_never_is(phrase, short):
    assert is_loop(CAPTION + phrase * 70) and not is_loop(short)
