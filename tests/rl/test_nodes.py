"""Several nodes: each knows its number, and follows what the first announces."""

import sys
import threading
import time

import pytest

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.rl import ablations, launch, nodes

TWO = paths.CONFIGS / "accelerate" / "two_nodes.yaml"


@pytest.fixture
def second_node(monkeypatch):
    for name, value in zip(nodes.VARIABLES, ("1", "10.0.0.1", "29500"), strict=True):
        monkeypatch.setenv(name, value)


def test_a_node_that_does_not_know_its_number_is_told_what_to_set(monkeypatch):
    monkeypatch.delenv("NODE_RANK", raising=False)
    with pytest.raises(UserError, match=r"two_nodes.yaml is for 2 nodes, and NODE_RANK.*--follow.*1 to 1"):
        launch.command("caprl", "paper", 0, 8, "two_nodes.yaml")
    assert nodes.options(paths.CONFIGS / "accelerate" / "one_node.yaml") == []


def test_the_command_says_which_node_this_is(second_node):
    command = launch.command("caprl", "paper", 0, 8, "two_nodes.yaml")
    for option, value in (
        ("--machine_rank", "1"),
        ("--main_process_ip", "10.0.0.1"),
        ("--main_process_port", "29500"),
    ):
        assert command[command.index(option) + 1] == value


def test_a_node_follows_attempt_by_attempt(tmp_path, monkeypatch):
    """Node 0 makes `first` in two attempts and then `second`; the other takes part three times, in that order."""
    monkeypatch.setenv("NODE_RANK", "0")
    done, taken = set(), []
    follower = threading.Thread(
        target=nodes.follow, args=(tmp_path, ["first", "second"], done.__contains__, taken.append, 0.01)
    )
    follower.start()
    for name in ("first", "first", "second"):
        before = len(taken)
        with nodes.announced(tmp_path, name):
            deadline = time.monotonic() + 20
            while len(taken) == before and time.monotonic() < deadline:
                time.sleep(0.01)
    done.update(("first", "second"))
    follower.join(timeout=20)
    assert not follower.is_alive() and taken == ["first", "first", "second"]
    assert list(tmp_path.iterdir()) == []


def test_one_node_announces_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("NODE_RANK", raising=False)
    with nodes.announced(tmp_path, "first"):
        assert list(tmp_path.iterdir()) == []


def test_following_ends_when_all_is_done_and_a_failure_is_left_to_the_first_node(
    world, monkeypatch, tmp_path, caplog
):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    profile = str(world / "tiny.yaml")
    logs = tmp_path / "tiny" / "rl" / ".logs"
    (logs / "caprl-seed0.starting.json").parent.mkdir(parents=True)
    (logs / "caprl-seed0.starting.json").write_text('{"attempt": "a"}')

    def fails(experiment, name, seed):
        for run in ("caprl-seed0", "caprl-seed1"):
            folder = tmp_path / "tiny" / "rl" / run
            folder.mkdir()
            (folder / "result.json").write_text("{}")
        raise UserError(f"the training {experiment} ended with status 1")

    monkeypatch.setattr(ablations, "take_part", fails)
    monkeypatch.setattr(ablations, "finished", lambda *_: {})
    ablations.follow(profile, ["caprl"])
    assert "caprl ended with status 1; waiting for node 0" in caplog.text


def test_a_node_takes_part_with_a_log_of_its_own(world, second_node, monkeypatch, tmp_path):
    """And leaves node 0's log and progress alone."""
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    logs = tmp_path / "tiny" / "rl" / ".logs"
    logs.mkdir(parents=True)
    (logs / "small-seed0.log").write_text("of node 0")
    names = str(world / "small.yaml"), str(world / "tiny.yaml"), 0
    monkeypatch.setattr(launch, "command", lambda *_: [sys.executable, "-c", "print('rank 1')"])
    launch.take_part(*names)
    assert (logs / "small-seed0.node1.log").read_text() == "rank 1\n"
    assert (logs / "small-seed0.log").read_text() == "of node 0"
    monkeypatch.setattr(launch, "command", lambda *_: [sys.executable, "-c", "exit('no rendezvous')"])
    with pytest.raises(UserError, match=r"(?s)exit status 1.*small-seed0.node1.log:.*no rendezvous"):
        launch.take_part(*names)


def test_a_record_of_other_settings_is_not_done(world, monkeypatch, tmp_path):
    """An old result must not end the following before node 0 has made the new one."""
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    folder = tmp_path / "tiny" / "rl" / "caprl-seed0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    asked = []

    def seen(place, names, done, start):
        asked.extend([done("caprl-seed0"), done("caprl-seed0"), done("caprl-seed1")])

    monkeypatch.setattr(ablations, "finished", lambda *_: asked.append("keys compared"))
    monkeypatch.setattr(ablations.nodes, "follow", seen)
    ablations.follow(str(world / "tiny.yaml"), ["caprl"])
    assert asked == ["keys compared", False, False, False]
