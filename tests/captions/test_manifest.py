"""Claims of live, dead and silent workers, on one machine and on several."""

import errno
import json
import logging
import os
import time

import pytest
from scripted_captioner import Scripted, fill

from caprl_utils.captions import manifest as claims
from caprl_utils.captions.job import caption_source
from caprl_utils.captions.manifest import Manifest
from caprl_utils.models.base import Sampling


@pytest.fixture
def prepared(tmp_path):
    """A job of three shards; two captions of the first are made, and nobody works on it."""
    images, out = fill(tmp_path / "images", 11), tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        caption_source(images, out, Scripted(die_after=3), Sampling(16, n=2), shard_images=4)
    return out


def test_a_silent_worker_of_another_machine_is_taken_over(prepared, monkeypatch):
    far = Manifest(prepared)
    monkeypatch.setattr(claims.socket, "gethostname", lambda: "far")
    lost = far.claim()
    monkeypatch.undo()
    here = Manifest(prepared)
    assert {here.claim().shard, here.claim().shard} == {1, 2} and here.claim() is None
    claim_file = prepared / "claims" / "00000.json"
    os.utime(claim_file, (0, time.time() - claims.STALE_SEC - 1))
    taken = here.claim()
    assert taken.shard == 0 and len(taken.rows.read_bytes().splitlines()) >= 2
    assert not far.finish(lost, b"late", {}) and not (prepared / "shards" / "00000.parquet").exists()
    assert here.finish(taken, b"mine", {})


def test_a_live_worker_keeps_its_shard(prepared):
    one, two = Manifest(prepared), Manifest(prepared)
    with one.heartbeat():
        shards = {one.claim().shard, one.claim().shard}
        assert two.claim().shard not in shards and two.claim() is None
    assert Manifest(prepared).claim().shard in shards


def test_a_beat_that_does_not_come_through_is_told_and_the_next_one_does(prepared, monkeypatch, caplog):
    """ESTALE and EIO come and go on a network file system; a thread that ends with one loses every claim."""
    monkeypatch.setattr(claims, "HEARTBEAT_SEC", 0.01)
    one, beats, touch = Manifest(prepared), [], os.utime

    def flaky(path, *more):
        beats.append(path)
        if len(beats) < 3:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        touch(path, *more)

    with one.heartbeat(), caplog.at_level(logging.WARNING):
        file = prepared / "claims" / f"{one.claim().shard:05d}.json"
        touch(file, (0, 0))
        monkeypatch.setattr(claims.os, "utime", flaky)
        deadline = time.monotonic() + 10
        while not file.stat().st_mtime and time.monotonic() < deadline:
            time.sleep(0.01)
        monkeypatch.undo()
        assert file.stat().st_mtime > 0
    assert "the claim of shard 0 could not be kept alive: [Errno 116]" in caplog.text


@pytest.mark.parametrize("name", ["host", "boot", "pid_space"])
def test_a_process_number_of_another_machine_or_container_says_nothing(name, prepared, monkeypatch):
    """Two containers with one host name: the other's worker lives, though we have no process of its number."""
    there = claims._machine() | {name: "another"}
    monkeypatch.setattr(claims, "_machine", lambda: there)
    monkeypatch.setattr(claims, "_start_time", lambda pid: None)  # gone, as seen from here
    shard = Manifest(prepared).claim().shard
    assert json.loads((prepared / "claims" / f"{shard:05d}.json").read_text())[name] == "another"
    monkeypatch.undo()
    monkeypatch.setattr(claims, "_start_time", lambda pid: None)
    here = Manifest(prepared)
    assert shard not in {here.claim().shard, here.claim().shard} and here.claim() is None


def test_a_claim_tells_its_machine(prepared):
    found = claims._machine()
    assert found["pid_space"] == os.readlink("/proc/self/ns/pid") and len(found["boot"]) == 36
    shard = Manifest(prepared).claim().shard
    owner = json.loads((prepared / "claims" / f"{shard:05d}.json").read_text())
    assert owner | found == owner and owner["pid"] == os.getpid()
