"""Real processes: the command line killed and shared, workers on cores of their own, Ray, vLLM's engine."""

import importlib.util
import os
import random
import re
import resource
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from scripted_captioner import fill, picture

from caprl_utils import paths, processes
from caprl_utils.captions.job import caption_source, make_job, prepare, read_job
from caprl_utils.models.base import Sampling
from caprl_utils.schema import ModelConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from fake_server import FakeServer

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

IMAGES, IN_FLIGHT = 120, 4
DRIVER_NOISE_MIB = 6
MAX_IMAGE_BYTES = 350  # 1.6 GiB for 5 million images


@pytest.fixture
def images(tmp_path):
    return fill(tmp_path / "images", IMAGES)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    from caprl_utils.mini.zoo.models import build_processor, build_vlm, prepare_generation

    folder = tmp_path_factory.mktemp("vlm")
    model = build_vlm(seed=0)
    prepare_generation(model)
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


def command(images, out, url, *more):
    return [
        sys.executable, "-m", "caprl_utils.captions", str(images), "--out", str(out), "--model", "fake",
        "--base-url", url, "--batch-size", str(IN_FLIGHT), "--shard-images", "8", "--max-tokens", "32", *more,
    ]  # fmt: skip


def start(command, log):
    return processes.popen(command, log, {"PYTHONPATH": str(paths.ROOT)})


def table(file):
    return pq.read_table(file).to_pylist()


def test_the_command_line_survives_ten_kills(images, tmp_path):
    with FakeServer() as server:
        processes.run(command(images, tmp_path / "whole.parquet", server.url), tmp_path / "whole.log")
        assert sum(server.attempts.values()) == IMAGES
    kills, draw = 0, random.Random(0)
    out = tmp_path / "captions.parquet"
    with FakeServer(delay_sec=0.1) as server:
        while kills < 10:
            asked = sum(server.attempts.values())
            process = start(command(images, out, server.url), tmp_path / "killed.log")
            target = asked + draw.randint(1, 12)
            while process.poll() is None and sum(server.attempts.values()) < target:
                time.sleep(0.005)
            if process.poll() is not None:
                break
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        server.delay_sec = 0
        processes.run(command(images, out, server.url), tmp_path / "last.log")
        twice = sum(server.attempts.values()) - len(server.attempts)
    assert kills >= 8
    assert table(out) == table(tmp_path / "whole.parquet")
    assert len(server.attempts) == IMAGES
    assert twice <= kills * 2 * IN_FLIGHT  # answered but not read yet counts as in flight
    print(f"{kills} kills, {twice} requests were in flight and asked again")


def test_two_command_lines_share_one_manifest(images, tmp_path):
    out = tmp_path / "captions.parquet"
    with FakeServer(delay_sec=0.2) as server:
        started = [start(command(images, out, server.url), tmp_path / f"{n}.log") for n in (0, 1)]
        assert [process.wait() for process in started] == [0, 0]
        assert set(server.attempts.values()) == {1} and len(server.attempts) == IMAGES
        assert server.most_busy > IN_FLIGHT  # both had work at the same time
    assert len({row["id"] for row in table(out)}) == IMAGES


PEAK = "print('peak', __import__('resource').getrusage(0).ru_maxrss)"
COMMAND = f"""
import sys
from caprl_utils.captions.__main__ import main
status = main(sys.argv[1:])
{PEAK}
sys.exit(status)
"""
PREPARE = f"""
import sys
from pathlib import Path
from caprl_utils.models.base import Sampling
from caprl_utils.captions.job import make_job, prepare
from caprl_utils.schema import ModelConfig
model = ModelConfig(path="fake", backend="endpoint", base_urls=["http://127.0.0.1:9/v1"])
prepare(make_job(sys.argv[1], model, Sampling(8), "endpoint", check="header"), Path(sys.argv[2]))
{PEAK}
"""


def peak_mib(code, arguments, log):
    """Peak resident memory of a Python process that runs `code`, in MiB."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    processes.run(command, log, {"PYTHONPATH": str(paths.ROOT)})
    return int(re.search(r"peak (\d+)", log.read_text())[1]) / 1024


def test_the_driver_holds_nothing_of_the_images_while_workers_caption(tmp_path):
    """What 2,700 images more may add is the noise of two processes; the bytes an image are measured below."""
    peaks = {}
    with FakeServer() as server:
        for count in (300, 3000):
            folder = tmp_path / f"images{count}"
            fill(folder, 30)
            for number in range(30, count):
                shutil.copy(folder / f"p{number % 30:03d}.png", folder / f"p{number:03d}.png")
            out, more = tmp_path / f"{count}.parquet", ("--workers", "2", "--shard-images", "64")
            arguments = command(folder, out, server.url, *more)[3:]
            peaks[count] = peak_mib(COMMAND, arguments, tmp_path / f"{count}.log")
            assert len(table(out)) == count
    print(f"driver's peak memory in MiB: {peaks}")
    assert peaks[3000] < peaks[300] + DRIVER_NOISE_MIB


def test_the_check_of_five_million_images_would_fit_a_workstation(tmp_path):
    """Hash of the source, check and table of images, in folders of 1,000 with the shard size of a real job: what
    100,000 images more take, by the image (measured: 190 to 265 bytes, the fewer the more images)."""
    peaks = {}
    for count in (50_000, 150_000):
        folder = tmp_path / f"images{count}"
        for number in range(count):
            target = folder / f"{number // 1000:05d}" / f"COCO_train2014_{number:012d}.png"
            if number % 1000 == 0:
                target.parent.mkdir(parents=True)
                picture(number).save(first := target)
            else:
                os.link(first, target)
        arguments = [folder, tmp_path / f"job{count}"]
        peaks[count] = peak_mib(PREPARE, arguments, tmp_path / f"{count}.log")
    image_bytes = (peaks[150_000] - peaks[50_000]) * 2**20 / 100_000
    print(f"driver's peak memory in MiB: {peaks}, {image_bytes:.0f} bytes an image")
    assert image_bytes < MAX_IMAGE_BYTES


def busy_seconds():
    """Seconds of CPU that all programs of the machine have used, and those of our children that have ended."""
    times, ours = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
    names = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(getattr(times, name, 0.0) for name in names) - ours.ru_utime - ours.ru_stime


def pinned(folder, vlm, cores, num_images, apart=False):
    """(seconds of work, CPU seconds of each worker, cores that other programs used) for workers on these cores, models
    loaded beforehand. apart: each has a manifest of its own with its share of the images."""
    model = ModelConfig(path=str(vlm), batch_size=8)
    sampling = Sampling(max_tokens=24, temperature=1.0)
    homes = [folder / str(core) if apart else folder for core in cores]
    manifests = []
    for home in dict.fromkeys(homes):
        source = f"mini-world:rl:{num_images // len(set(homes))}"
        job = make_job(source, model, sampling, "local", retries=0, shard_images=8)
        manifests.append(prepare(job, home))
    ready, go = [folder / f"ready-{core}" for core in cores], folder / "go"
    logs = [folder / f"{core}.log" for core in cores]
    script = str(Path(__file__).with_name("pinned_worker.py"))
    started = [
        processes.popen(
            [sys.executable, script, str(home), str(core), str(flag), str(go)], log,
            {"PYTHONPATH": str(paths.ROOT), "OMP_NUM_THREADS": "1"},
        )
        for home, core, flag, log in zip(homes, cores, ready, logs, strict=True)
    ]  # fmt: skip
    try:
        while not all(flag.exists() for flag in ready):
            assert all(process.poll() is None for process in started), [processes.tail(log) for log in logs]
            time.sleep(0.1)
        go.touch()
        begin, busy = time.monotonic(), busy_seconds()
        assert [process.wait() for process in started] == [0] * len(cores)
        ended, busy = time.monotonic(), busy_seconds() - busy
    finally:
        for process in started:
            processes.stop(process)
    assert all(len(manifest.finished()) == manifest.num_shards for manifest in manifests)
    found = [re.search(r"done (\S+) cpu (\S+) (\S+)", log.read_text()).groups() for log in logs]
    done, before, used = ([float(value) for value in column] for column in zip(*found, strict=True))
    # the clock is the machine's, and a process that has loaded torch takes a second to end
    return max(done) - begin, used, (busy + sum(before)) / (ended - begin)


def test_two_workers_on_two_cores_are_at_least_1_8_times_as_fast(tmp_path, vlm):
    """The median of three rounds in turn: a machine's speed wanders by a tenth in minutes.

    Two virtual cores may be one of the hardware, or share its caches: then no two programs are twice as fast as one.
    What two unrelated jobs reach, one a core, is measured beside it, and 1.8 of 2 is asked of that.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("needs two cores")
    ratios, limits, others, told = [], [], [], []
    for number in range(3):
        one, (alone,), others_then = pinned(tmp_path / f"{number}-one", vlm, cores[:1], 480)
        two, shared, others_now = pinned(tmp_path / f"{number}-two", vlm, cores, 480)
        apart, _, others_last = pinned(tmp_path / f"{number}-apart", vlm, cores, 480, apart=True)
        ratios.append(one / two)
        limits.append(min(2.0, one / apart))
        others += [others_then, others_now, others_last]
        told.append(
            f"{one:.1f} and {two:.1f} s: {one / two:.2f} times, two unrelated jobs {one / apart:.2f}; "
            f"of CPU {alone:.1f} and {max(shared):.1f} s: {alone / max(shared):.2f} times; "
            f"cores that others used {max(others[-3:]):.2f}"
        )
    found = "\n".join(told)
    print(found)
    if max(others) > 0.2:  # they take time, and caches too
        pytest.skip(found)
    assert statistics.median(ratios) >= 1.8 / 2 * statistics.median(limits), found


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray_actors_work_on_the_same_manifest(images, tmp_path):
    with FakeServer(delay_sec=0.05) as server:
        model = ModelConfig(path="fake", backend="endpoint", base_urls=[server.url], batch_size=IN_FLIGHT)
        sampling = Sampling(max_tokens=32, temperature=1.0)
        result = caption_source(
            images, tmp_path / "ray.parquet", model, sampling, engine="endpoint", workers=2, runner="ray",
            shard_images=8,
        )  # fmt: skip
        assert result.num_captions == IMAGES
        assert set(server.attempts.values()) == {1} and server.most_busy > IN_FLIGHT


def test_vllm_refuses_a_wrong_argument_before_loading(vlm, monkeypatch):
    from caprl_utils.captions import vllm_offline
    from caprl_utils.errors import UserError

    options = vllm_offline.engine_options(ModelConfig(path=str(vlm)), max_model_len=256)
    assert (options.max_model_len, options.limit_mm_per_prompt) == (256, {"image": 1})
    good = vllm_offline.engine_arguments(ModelConfig(path=str(vlm)))
    monkeypatch.setattr(vllm_offline, "engine_arguments", lambda *_: [*good, "--max-nun-seqs", "4"])
    with pytest.raises(UserError, match=r"vLLM knows no --max-nun-seqs"):
        vllm_offline.engine_options(ModelConfig(path=str(vlm)))


def test_vllm_in_process_writes_what_transformers_writes(vlm, tmp_path):
    """In a process of its own: vLLM's engine keeps what it has taken until the process ends."""
    from caprl_utils.models.local import LocalBackend

    source, sampling = "mini-world:rl:6", Sampling(max_tokens=12)
    arguments = [
        source, "--out", str(tmp_path / "vllm.parquet"), "--model", str(vlm), "--engine", "vllm",
        "--max-tokens", "12", "--temperature", "0", "--retries", "0",
    ]  # fmt: skip
    log = tmp_path / "vllm.log"
    processes.run(
        [sys.executable, "-m", "caprl_utils.captions", *arguments], log, {"PYTHONPATH": str(paths.ROOT)}
    )
    local = LocalBackend(ModelConfig(path=str(vlm)))
    caption_source(source, tmp_path / "local.parquet", local, sampling, retries=0)
    assert table(tmp_path / "vllm.parquet") == table(tmp_path / "local.parquet")
    assert read_job(tmp_path / "vllm.parquet.work")["job"]["engine"] == "vllm"


def test_a_worker_that_fails_is_told_with_the_end_of_its_log(images, tmp_path):
    gone = ModelConfig(path="fake", backend="endpoint", base_urls=["http://127.0.0.1:9/v1"])
    from caprl_utils.errors import UserError

    with pytest.raises(UserError, match=r"(?s)all 2 workers ended .* no model server answers"):
        caption_source(images, tmp_path / "c.parquet", gone, Sampling(8), engine="endpoint", workers=2)
