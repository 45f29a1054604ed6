"""Which GPU a worker gets, without one."""

import pytest

from caprl_utils.captions import engines


@pytest.mark.parametrize(
    "given, there, wanted",
    [
        (None, 3, ["0", "1", "2"]),
        (None, 0, []),
        ("4, 6", 8, ["4", "6"]),
        ("GPU-1a,MIG-2b", 8, ["GPU-1a", "MIG-2b"]),
        ("", 8, []),
        ("1,-1,2", 8, ["1"]),
    ],
)
def test_the_gpus_of_a_worker_are_those_that_were_given(given, there, wanted, monkeypatch):
    monkeypatch.setattr(engines, "gpu_names", lambda: ["H100"] * there)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert engines.visible_gpus() == wanted


def test_workers_take_them_in_turn_or_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = [engines.worker_environment(number, ["4", "6"]) for number in range(3)]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in found] == ["4", "6", "4"]
    assert engines.worker_environment(1, []) == {"OMP_NUM_THREADS": "1"}


def test_the_processes_are_started_with_them(tmp_path, monkeypatch):
    """What `run_workers` hands to each process, on a shared machine where GPUs 5 and 7 are ours."""

    class Done:
        def poll(self):
            return 0

    started = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setattr(engines, "follow", lambda *_: None)
    monkeypatch.setattr(engines.processes, "stop", lambda _: None)
    monkeypatch.setattr(engines, "Manifest", lambda _: type("All", (), {"finished": set, "num_shards": 0})())
    monkeypatch.setattr(engines.processes, "popen", lambda command, log, env: started.append(env) or Done())
    engines.run_workers(tmp_path, 2, "processes")
    assert [env["CUDA_VISIBLE_DEVICES"] for env in started] == ["5", "7"]
