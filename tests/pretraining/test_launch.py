"""LLaMA-Factory as a process: a script in its place shows what it is given, and what becomes of it."""

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
from caprl_utils.pretraining import chain, evaluate, launch, stages
from caprl_utils.pretraining.sets import Training

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


def test_several_nodes_are_started_by_slurm(monkeypatch, tmp_path):
    program(monkeypatch, tmp_path, "")
    paper = load_profile("paper")
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    with pytest.raises(
        UserError, match=r"Slurm job of 2 nodes \(here: none\).*configs/slurm/llamafactory\.slurm"
    ):
        chain.run(paper)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("MASTER_ADDR", "host")
    launch.check_nodes(paper.pretraining)
    started = launch.command(tmp_path / "train.yaml", 2)
    assert started[:2] == ["srun", "--nodes=2"] and started[-2:] == ["train", str(tmp_path / "train.yaml")]
    found = launch.environment(paper, tmp_path)
    assert (found["NNODES"], found["NPROC_PER_NODE"], found["FORCE_TORCHRUN"]) == ("2", "8", "1")
    assert str(launch.SITE) in found["PYTHONPATH"]
    script = paths.CONFIGS / "slurm" / "llamafactory.slurm"
    subprocess.run(["bash", "-n", str(script)], check=True)


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
