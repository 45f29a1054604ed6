"""LLaMA-Factory as a process: a script in its place shows what it is given, and what becomes of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.errors import UserError
from caprl_utils.pretraining import chain, evaluate, launch, sets, stages
from caprl_utils.pretraining.sets import Training
from caprl_utils.rl import nodes
from caprl_utils.runs import Run

NODES = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
RECORDS = """#!{python}
import json, os, sys, time
from pathlib import Path
names = ("NODE_RANK", "NNODES", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "FORCE_TORCHRUN", "HF_DATASETS_CACHE")
config = Path(sys.argv[2])
told = {{name: os.environ.get(name) for name in names}} | {{"text": config.read_text()}}
here = config.parent
(here / f"seen-{{os.environ['NODE_RANK']}}.json").write_text(json.dumps(told))
while len(list(here.glob("seen-*.json"))) < 2:  # as torchrun waits for all nodes
    time.sleep(0.05)
"""
SLEEPS = """#!{python}
import subprocess, sys, time
print("started", flush=True)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
open(sys.argv[2] + ".pids", "w").write(str(worker.pid))
time.sleep(300)
"""


def program(monkeypatch, folder, text):
    """A script that stands for llamafactory-cli."""
    file = folder / "environment" / "bin" / "llamafactory-cli"
    file.parent.mkdir(parents=True)
    file.write_text(text.format(python=sys.executable))
    file.chmod(0o755)
    monkeypatch.setattr(launch, "ENVIRONMENT", file.parents[1])


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_the_other_nodes_take_part_in_each_training_once_it_is_announced(monkeypatch, tmp_path, runs_folder):
    """Node 0's part is played here by its own functions; the follower is the real command."""
    program(monkeypatch, tmp_path, RECORDS)
    profile = two_nodes(tmp_path)
    monkeypatch.setenv("NODE_RANK", "0")
    for name, value in NODES.items():
        monkeypatch.setenv(name, value)
    trainings = sets.wanted(profile.pretraining)
    for training in trainings:  # of other settings: neither its train.yaml is taken nor its record
        with Run.open(profile, stages.STAGE, training.name, {}, ["caprl_utils.errors"]) as run:
            (run.folder / "train.yaml").write_text("of an earlier attempt")
            run.finish(values={}, n=1, unit="row")
    inputs = stages.Inputs(tmp_path / "model", tmp_path, "align", "hash", tmp_path, 4)
    inputs.model.mkdir()
    (inputs.model / "config.json").write_text("{}")
    code = (
        "import sys; from pathlib import Path; from caprl_utils.pretraining import chain, launch; "
        f"launch.ENVIRONMENT = Path({str(launch.ENVIRONMENT)!r}); sys.exit(chain.main(sys.argv[1:]))"
    )
    follower = subprocess.Popen(
        [sys.executable, "-c", code, "--profile", str(tmp_path / "two.yaml"), "--follow"],
        env=os.environ | {"NODE_RANK": "1"}, cwd=paths.ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for training in trainings:
            with stages.open_run(profile, training, inputs) as run:
                config = run.folder / "train.yaml"
                config.write_text(f"now {training.name}")
                env = launch.environment(profile, run.folder / ".datasets")
                with nodes.announced(chain._announcements(profile), training.name):
                    launch.run(config, run.folder / "train.log", env)
                run.finish(values={}, n=1, unit="row")
        out, _ = follower.communicate(timeout=60)
    finally:
        follower.kill()
    assert follower.returncode == 0 and f"all {len(trainings)} trainings have their record" in out
    for training in trainings:
        folder = stages.folder_of(profile, training.name)
        seen = [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
        assert [one["NODE_RANK"] for one in seen] == ["0", "1"]
        for one in seen:
            assert one["text"] == f"now {training.name}"
            assert (one["NNODES"], one["NPROC_PER_NODE"], one["FORCE_TORCHRUN"]) == ("2", "8", "1")
            assert one["MASTER_ADDR"] == "127.0.0.1" and one["MASTER_PORT"] == "29500"
        assert seen[0]["HF_DATASETS_CACHE"] != seen[1]["HF_DATASETS_CACHE"]
        assert (folder / "train.node1.log").exists() and not (folder / ".datasets-node1").exists()
        assert not list(folder.parent.glob(".running/*.json"))


def two_nodes(folder):
    """Profile smoke on two nodes, as the follower's command reads it."""
    (folder / "two.yaml").write_text(
        "extends: smoke\npretraining: {nodes: 2, gpus_per_node: 8, parallel_runs: 1, further: {batch_size: 256},"
        " align: {batch_size: 256}, sft: {batch_size: 256}}\n"
    )
    return load_profile(str(folder / "two.yaml"))


def test_no_worker_outlives_a_kill_of_this_process(monkeypatch, tmp_path):
    program(monkeypatch, tmp_path, SLEEPS)
    config = tmp_path / "train.yaml"
    config.write_text("")
    code = (
        "from pathlib import Path; from caprl_utils.pretraining import launch; "
        f"launch.ENVIRONMENT = Path({str(launch.ENVIRONMENT)!r}); "
        f"launch.run(Path({str(config)!r}), Path({str(tmp_path / 'train.log')!r}), {{}})"
    )
    ours = subprocess.Popen([sys.executable, "-c", code], cwd=paths.ROOT)
    pids = Path(f"{config}.pids")
    wait_for(lambda: pids.exists() and pids.read_text())
    worker = int(pids.read_text())
    assert psutil.pid_exists(worker)
    os.kill(ours.pid, signal.SIGKILL)
    ours.wait()
    wait_for(lambda: not psutil.pid_exists(worker), 30)


def test_a_wrong_count_ends_the_training_when_it_is_logged(monkeypatch, tmp_path):
    logs = SLEEPS.replace('"started"', '"trainable params: 5 || all params: 15"')
    program(monkeypatch, tmp_path, logs)
    monkeypatch.setattr(
        stages.weights, "counts", lambda _: {"projector": 7, "vision_tower": 4, "language_model": 4}
    )
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "train.yaml").write_text("")
    (folder / "train.log").write_text("trainable params: 7 || all params: 15\n")  # of an earlier attempt
    profile = load_profile("smoke")
    training = Training("t", "mini-qwen-3b", "align", None)
    inputs = stages.Inputs(tmp_path, tmp_path, "align", "hash", tmp_path, 4)
    watch = stages._watch(profile, training, inputs, folder, lambda *_: None)
    start = time.monotonic()
    with pytest.raises(UserError, match="5 of 15 parameters trained, expected 7 of 15"):
        launch.run(folder / "train.yaml", folder / "train.log", {}, watch)
    assert time.monotonic() - start < 60
    worker = int((folder / "train.yaml.pids").read_text())
    wait_for(lambda: not psutil.pid_exists(worker), 30)


def test_what_a_kill_after_the_record_left_is_removed(tmp_path, runs_folder):
    profile, training = load_profile("smoke"), Training("t", "mini-qwen-3b", "align", None)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    inputs = stages.Inputs(model, tmp_path, "align", "hash", tmp_path, 4)
    with stages.open_run(profile, training, inputs) as run:
        run.finish(values={"steps": 1}, n=4, unit="row")
    (run.folder / "work" / "checkpoint-2").mkdir(parents=True)
    assert stages.train(profile, training, inputs)["values"] == {"steps": 1}
    assert not (run.folder / "work").exists()


def test_the_llava_template_is_in_the_key(tmp_path, monkeypatch):
    profile, training = load_profile("smoke"), Training("t", "mini-qwen-3b", "align", None)
    (tmp_path / "config.json").write_text("{}")
    inputs = stages.Inputs(tmp_path, tmp_path, "align", "hash", tmp_path, 4)
    keys = []
    for text in ("one", "other"):
        site = tmp_path / f".{text}"
        site.mkdir()
        (site / "sitecustomize.py").write_text(text)
        monkeypatch.setattr(launch, "SITE", site)
        with stages.open_run(profile, training, inputs) as run:
            keys.append(run.key)
    assert keys[0] != keys[1]


def test_benchmarks_are_the_papers_where_they_are_not_rendered():
    assert evaluate.benchmarks_of(load_profile("mini")) == load_profile("mini").prism.benchmarks
    for name in ("paper", "one_gpu"):
        found = evaluate.benchmarks_of(load_profile(name))
        assert len(found) == 12 and "mmbench" in found and "mathverse" not in found


@pytest.mark.integration
def test_evaluations_run_side_by_side_and_go_on(monkeypatch, tmp_path, runs_folder):
    """With a zoo model in the place of trained ones; the second call reads back."""
    profile = load_profile("smoke", {"prism": {"num_samples": 2, "benchmarks": ["mini-chart"]}})
    names = ["mini-qwen-3b-vanilla-sft", "mini-qwen-3b-caprl-1m-sft", "mini-qwen-3b-densefusion-1m-sft"]
    for name in names:
        final = stages.folder_of(profile, name) / "final"
        final.parent.mkdir(parents=True)
        final.symlink_to(paths.ZOO / "vlm-3b")
    seen = []
    monkeypatch.setattr(
        evaluate.Progress, "update", lambda self, count=1, note=None: seen.append((self.label, note))
    )
    records = evaluate.evaluate(profile, names)
    assert list(records) == names and all(r["values"]["average"] is not None for r in records.values())
    assert {note for label, note in seen if label == "evaluations"} == set(names)
    alone = profile.model_copy(
        update={"pretraining": profile.pretraining.model_copy(update={"parallel_runs": 1})}
    )
    assert evaluate.evaluate(alone, names) == records
