"""Captions by workers under Ray: kills, nothing twice, memory of the driver, a store as source and result."""

import contextlib
import json
import os
import random
import shutil
import statistics
import sys
import time

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from caprl_utils import paths, processes
from caprl_utils.captions.export import read_captions
from caprl_utils.captions.job import caption_source
from caprl_utils.errors import UserError
from caprl_utils.models.base import Sampling
from tests.captions.scripted_captioner import Scripted, asked, fill

pytestmark = [pytest.mark.integration, pytest.mark.timeout(3000)]
SAMPLING = Sampling(max_tokens=16, temperature=1.0, n=2, seed=3)
ENV = {"PYTHONPATH": str(paths.ROOT), "CUDA_VISIBLE_DEVICES": ""}
JOB = """
import sys
from tests.captions.scripted_captioner import Scripted
from tests.bench.harness import peak_gb
from caprl_utils.captions.job import caption_source
from caprl_utils.models.base import Sampling
source, out, log, sec, batch = sys.argv[1:]
found = caption_source(source, out, Scripted(log=log or None, sec=float(sec)), Sampling(16, 1.0, n=2, seed=3),
                       workers=2, shard_images=int(batch))
print("made", found.captions, "peak", peak_gb(), flush=True)
"""


def job(source, out, log="", sec=0.0, batch=8):
    return [sys.executable, "-c", JOB, str(source), str(out), str(log), str(sec), str(batch)]


def texts(captions):
    return {row["id"]: row["caption"] for row in read_captions(captions)}


def test_ten_kills_lose_nothing_and_write_nothing_twice(tmp_path):
    images = fill(tmp_path / "images", 150)
    whole = caption_source(images, tmp_path / "whole.parquet", Scripted(), SAMPLING)
    out, log, kills, starts, draw = tmp_path / "set", tmp_path / "asked.txt", 0, 0, random.Random(0)
    while kills < 10 and starts < 20:  # on a loaded machine Ray may not start
        starts += 1
        before = len(asked(log))
        process = processes.popen(job(images, out, log, 0.05), tmp_path / f"killed-{kills}.log", ENV)
        while process.poll() is None and len(asked(log)) < before + draw.randint(1, 30):
            time.sleep(0.02)
        if process.poll() == 0:
            break
        if process.poll() is not None:
            continue
        tree = psutil.Process(process.pid)
        for one in [*tree.children(recursive=True), tree]:  # Ray's own processes and the workers too
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        kills += 1
    assert processes.popen(job(images, out), tmp_path / "last.log", ENV).wait() == 0
    rows = list(read_captions(out))
    assert {row["id"]: row["caption"] for row in rows} == texts(whole.file) and len(rows) == 300
    assert kills >= 8
    print(f"{kills} kills; {len(asked(log)) - len(set(asked(log)))} of 300 captions were in flight and made again")


def test_workers_write_what_one_process_writes_and_do_nothing_twice(tmp_path, monkeypatch):
    """One file too; a dead worker's batch is done by another; repeated ids and bad images are set aside."""
    images, log = fill(tmp_path / "images", 40), tmp_path / "asked.txt"
    (images / "text.png").write_text("no image")
    whole = caption_source(images, tmp_path / "whole.parquet", Scripted(), SAMPLING)
    slow, out = Scripted(log=log, sec=0.3), tmp_path / "c.parquet"
    found = caption_source(images, out, slow, SAMPLING, workers=2, shard_images=4)
    assert texts(found.file) == texts(whole.file) and found.bad == whole.bad == {"text.png": "not an image"}
    assert (found.images, found.captions, found.tokens) == (40, 80, 400)
    assert len(asked(log)) == 80 and len({line.split()[0] for line in log.read_text().splitlines()}) == 2
    data = [(images / "p000.png").read_bytes()] * 3
    pq.write_table(pa.table({"image": data, "id": ["a", "b", "a"]}), tmp_path / "s.parquet")
    out = tmp_path / "set"

    def again(broken=()):
        source, captioner = tmp_path / "s.parquet", Scripted(broken=broken)
        return caption_source(source, out, captioner, SAMPLING, workers=1, max_bad_share=0.5)

    with pytest.raises(UserError, match=r"none of 2 images was captioned; a: server said no"):
        again(broken=["a", "b"])
    some = again(broken=["b"])
    assert some.failed == {"b": "server said no"} and some.captions == 2
    assert some.bad == {"a (s.parquet#2)": "id used by an earlier image"}
    assert sorted(texts(again().file)) == ["a#0", "a#1", "b#0", "b#1"]
    extra = out / "shards" / "zzz.parquet"  # as by a worker that outlived its driver
    shutil.copy(next(extra.parent.glob("*.parquet")), extra)
    assert again().captions == 4 and len(list(read_captions(out))) == 4
    shard = next((out / "shards").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(UserError, match=r"parquet is half-written or damaged"):
        again()


def test_the_driver_holds_hardly_anything_of_the_images(tmp_path):
    """What 99,000 images more may add is 16 bytes each and the noise of two processes."""
    data = (fill(tmp_path / "images", 1) / "p000.png").read_bytes()
    peaks, seconds = {}, {}
    for count in (1_000, 100_000):
        source, log, start = tmp_path / f"{count}.parquet", tmp_path / f"{count}.log", time.monotonic()
        with pq.ParquetWriter(source, pa.schema([("image", pa.binary())])) as writer:
            for _ in range(count // 1000):
                writer.write_table(pa.table({"image": [data] * 1000}))
        assert processes.popen(job(source, tmp_path / f"set-{count}", batch=256), log, ENV).wait() == 0
        _, made, _, peak = log.read_text().splitlines()[-1].split()
        assert int(made) == 2 * count
        peaks[count], seconds[count] = 1024 * float(peak), time.monotonic() - start
    print(f"driver's peak memory in MiB: {peaks}; seconds: {seconds}")
    assert peaks[100_000] < peaks[1_000] + 40


@pytest.fixture
def bucket(monkeypatch):
    """An S3 server on this machine with one bucket."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
                        "AWS_DEFAULT_REGION": "us-east-1", "FSSPEC_S3_ENDPOINT_URL": url}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    files = fsspec.filesystem("s3", endpoint_url=url, key="x", secret="x")
    files.mkdir("data")
    yield files
    server.stop()


def test_a_store_is_source_and_result(tmp_path, bucket):
    images = fill(tmp_path / "images", 12)
    bucket.put(str(images), "data/images", recursive=True)
    (tmp_path / "list.txt").write_text("images/p003.png\ns3://data/images/p001.png\n../other/x.png\n")
    bucket.put(str(tmp_path / "list.txt"), "data/list.txt")
    here = caption_source(images, tmp_path / "here.parquet", Scripted(), SAMPLING)
    one = caption_source("s3://data/images", tmp_path / "one.parquet", Scripted(), SAMPLING)
    assert texts(one.file) == texts(here.file)
    few = caption_source("s3://data/list.txt", tmp_path / "f.parquet", Scripted(), SAMPLING, max_bad_share=0.5)
    assert few.images == 2 and list(few.bad.values()) == ["path outside the root"]
    there = "s3://data/images", "s3://data/captions", Scripted(), SAMPLING
    for _ in range(2):
        far = caption_source(*there, workers=1, shard_images=5)
        assert texts("s3://data/captions") == texts(here.file) and far.images == 12
    assert json.loads(bucket.cat_file("data/captions/result.json"))["captions"] == 24
    with pytest.raises(UserError, match=r"no s3://data/nowhere"):
        caption_source("s3://data/nowhere", tmp_path / "x.parquet", Scripted(), SAMPLING)
    bucket.pipe_file("data/images/new.png", b"x")
    more = caption_source(*there, workers=1)
    assert more.bad == {"new.png": "not an image"} and more.images == 12


ONE_THREAD = ENV | {"OMP_NUM_THREADS": "1"}
TIMED = """
import sys
from tests.captions.scripted_captioner import Timed
from caprl_utils.captions.job import caption_source
from caprl_utils.models.base import Sampling
source, out, log, workers = sys.argv[1:]
caption_source(source, out, Timed("zoo:base", log), Sampling(48, 1.0), workers=int(workers), shard_images=96)
"""


def rate(commands, log, folder):
    """Captions a second of two processes while both work: no start of Ray or of a model, and no end."""
    started = [
        processes.popen([sys.executable, "-c", TIMED, *map(str, command)], folder / f"{number}.log", ONE_THREAD)
        for number, command in enumerate(commands)
    ]
    assert [process.wait() for process in started] == [0] * len(commands)
    times = {}
    for line in log.read_text().splitlines():
        pid, at = line.split()
        times.setdefault(pid, []).append(float(at))
    assert len(times) == 2, times.keys()
    first, last = max(min(t) for t in times.values()), min(max(t) for t in times.values())
    return sum(first <= t <= last for some in times.values() for t in some) / (last - first)


def test_two_actors_are_as_fast_as_two_unrelated_jobs(tmp_path):
    """Nine tenths of them, the median of three rounds in turn: a machine's speed wanders by a tenth in minutes."""
    from caprl_utils.image_sources import read_source

    halves = [tmp_path / "images" / half for half in "ab"]
    for half in halves:
        half.mkdir(parents=True)
    for number, item in enumerate(read_source("mini-world:rl:1600")):
        item.open().save(halves[number % 2] / f"{number:04d}.png")
    ratios, told = [], []
    for home in (tmp_path / str(number) for number in range(3)):
        home.mkdir()
        jobs = [(half, home / f"{half.name}.parquet", home / "apart.txt", 0) for half in halves]
        apart = rate(jobs, home / "apart.txt", home)
        together = rate([(tmp_path / "images", home / "set", home / "ray.txt", 2)], home / "ray.txt", home)
        ratios.append(together / apart)
        told.append(f"{together:.1f} captions/s by two actors, {apart:.1f} by two jobs: {together / apart:.2f}")
    print("\n".join([*told, f"load of the machine: {os.getloadavg()}"]))
    assert statistics.median(ratios) >= 0.9, told
