"""The loop over experiments: what is trained, in which order, and evaluated how."""

import threading
import time

import pytest

from caprl_utils.config import experiment_names, load_experiment, load_profile, profile_names
from caprl_utils.errors import UserError
from caprl_utils.rl import ablations


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_names_experiments_that_exist(name):
    profile = load_profile(name)
    runs = ablations.planned(profile)
    assert {run.experiment for run in runs} <= set(experiment_names())
    assert len({run.name for run in runs}) == len(runs)  # nothing is trained twice
    assert [r.seed for r in runs if r.experiment == "caprl"] == profile.rl.seeds


def test_main_run_has_all_seeds_others_one_and_those_added():
    profile = load_profile("mini", {"rl.seeds": [3, 4]})
    runs = ablations.planned(profile, ["rounds_1", "caprl", "natural"])
    assert [run.name for run in runs] == [
        "caprl-seed3", "caprl-seed4", "rounds_1-seed3", "rounds_1-seed1", "natural-seed3"
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"more_seeds names 'round_1'"):
        load_profile("mini", {"ablations.more_seeds": {"round_1": [1]}})


@pytest.fixture
def one_seed_each(monkeypatch):
    """The profiles as they are, but every experiment is trained once."""

    def load(name):
        profile = load_profile(name)
        single = profile.ablations.model_copy(update={"more_seeds": {}})
        return profile.model_copy(update={"ablations": single})

    monkeypatch.setattr(ablations, "load_profile", load)


def test_unknown_experiment_is_named():
    with pytest.raises(
        UserError, match=r"experiment 'round_1' is none of profile mini; did you mean rounds_1\?"
    ):
        ablations.planned(load_profile("mini"), ["round_1"])


def test_ablations_have_their_own_size():
    profile = load_profile("mini")
    short, resolved = load_experiment("short", "mini")
    assert short.size == "ablation" and resolved.rl.steps == profile.ablations.steps
    _, main = load_experiment("caprl", "mini")
    assert main.rl.steps == profile.rl.steps
    leaking, _ = load_experiment("leaking", "mini")
    assert leaking.data.num_images == profile.ablations.num_images
    paper, _ = load_experiment("refined", "paper")
    assert paper.data.num_images == 20_000


def test_the_loop_trains_and_evaluates_each_once(monkeypatch, one_seed_each):
    calls = []
    record = {"n": 9, "wall_sec": 60.0, "values": dict.fromkeys(
        ("steps", "reward_first", "reward_last", "completion_tokens_first", "completion_tokens_last"), 1)}  # fmt: skip

    def train(experiment, profile, seed, bar, stopping):
        calls.append(("train", experiment, seed))
        return record

    def judge(self, name, captioner, role):
        calls.append(("evaluate", name, role, captioner.path.split("/")[-1]))
        return {"values": {"average": 0.5}}

    monkeypatch.setattr(ablations, "launch", train)
    monkeypatch.setattr(ablations.Evaluation, "_evaluate", judge)
    rows = ablations.run_all("mini", ["short", "rounds_1"])
    assert [row["run"] for row in rows] == ["short-seed0", "rounds_1-seed0"]
    assert rows[0]["accuracy"] == 0.5 and rows[0]["minutes"] == 1.0
    assert [call for call in calls if call[0] == "train"] == [("train", "short", 0), ("train", "rounds_1", 0)]
    evaluated = [call[1:] for call in calls if call[0] == "evaluate"]
    assert evaluated[:2] == [
        ("base-3b", "prism_reader", "zoo:vlm-3b"),
        ("base-3b", "reward_reader", "zoo:vlm-3b"),
    ]
    assert sorted(evaluated[2:]) == [
        ("rounds_1-seed0", "prism_reader", "final"),
        ("short-seed0", "prism_reader", "final"),
        ("short-seed0", "reward_reader", "final"),
    ]
    assert ablations.prism_name("short-seed0", "reward_reader") == "short-seed0-by-reward_reader"


def test_table_3_has_the_judges_that_the_profile_trains():
    assert ablations.of_table_3(load_profile("mini")) == ["caprl", "judge_vlm", "judge_unified"]
    assert ablations.of_table_3(load_profile("smoke")) == ["caprl", "judge_vlm"]


def test_a_failed_training_holds_up_no_other(monkeypatch, one_seed_each):
    done = []

    def train(experiment, profile, seed, bar, stopping):
        if experiment == "rounds_1":
            raise UserError("no reader")
        done.append(experiment)
        return {}

    monkeypatch.setattr(ablations, "launch", train)
    monkeypatch.setattr(ablations, "summary", lambda *a: {})
    monkeypatch.setattr(ablations.Evaluation, "_evaluate", lambda *a: {})
    with pytest.raises(UserError, match=r"(?s)1 of 3 trainings failed.*rounds_1-seed0: no reader"):
        ablations.run_all("mini", ["short", "rounds_1", "rounds_2"])
    assert done == ["short", "rounds_2"]
    monkeypatch.setattr(ablations, "launch", lambda *a: (_ for _ in ()).throw(UserError("no questions")))
    with pytest.raises(UserError, match=r"^no questions$"):
        ablations.run_all("mini", ["caprl", "short"])


def test_trainings_run_side_by_side_the_longest_first(monkeypatch, one_seed_each):
    started, both = [], threading.Barrier(2, timeout=20)

    def train(experiment, profile, seed, bar, stopping):
        started.append(experiment)
        both.wait()  # breaks when they come one after the other
        bar.update(1, "reward 0.5")
        return {}

    monkeypatch.setattr(ablations, "launch", train)
    monkeypatch.setattr(ablations, "summary", lambda one, *a: {"run": one.name})
    monkeypatch.setattr(ablations.Evaluation, "_evaluate", lambda *a: {})
    rows = ablations.run_all("mini", ["short", "judge_vlm", "judge_unified", "rounds_1"])
    assert set(started[:2]) == {"judge_vlm", "judge_unified"}
    names = ["judge_vlm-seed0", "judge_unified-seed0", "short-seed0", "rounds_1-seed0"]
    assert [row["run"] for row in rows] == names


def test_interrupted_ends_all_trainings(monkeypatch, one_seed_each):
    ended, running = [], threading.Semaphore(0)

    def train(experiment, profile, seed, bar, stopping):
        running.release()
        assert stopping.wait(20)
        ended.append(experiment)
        raise UserError("ended")

    def interrupt(self):
        running.acquire(timeout=20)
        running.acquire(timeout=20)
        raise KeyboardInterrupt

    monkeypatch.setattr(ablations, "launch", train)
    monkeypatch.setattr(ablations.Evaluation, "base", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ablations.run_all("mini", ["short", "rounds_1", "rounds_2"])
    assert sorted(ended) == ["rounds_1", "short"]  # the third never started


def test_on_one_gpu_nothing_is_evaluated_beside_a_training(monkeypatch):
    busy = []
    record = {"n": 9, "values": dict.fromkeys(
        ("steps", "reward_first", "reward_last", "completion_tokens_first", "completion_tokens_last"), 1)}  # fmt: skip

    def alone(result):
        assert not busy, "two at once on one GPU"
        busy.append(1)
        time.sleep(0.01)
        busy.pop()
        return result

    monkeypatch.setattr(ablations, "gpu_names", lambda: ["H100"])
    monkeypatch.setattr(ablations, "launch", lambda *_: alone(record))
    monkeypatch.setattr(ablations.Evaluation, "_evaluate", lambda *_: alone({"values": {"average": 0.5}}))
    rows = ablations.run_all("one_gpu")
    assert [row["accuracy"] for row in rows] == [0.5] * len(ablations.planned(load_profile("one_gpu")))
