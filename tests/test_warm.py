"""Forks of a process that has imported everything: each with its own words, variables and log; none outlives us."""

import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from caprl_utils import paths, processes, warm
from tests.test_processes import told_pid, wait_until_gone

pytestmark = pytest.mark.timeout(90)
MODULE = """
import os, subprocess, sys, time
SERVER = os.getpid()
print("imported", file=sys.stderr)

def run():
    print(SERVER, *sys.argv[1:], os.environ.get("OWN"), sys.stdin.read(), sep=";")
    sys.exit(int(sys.argv[1]))

def wait():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    print(child.pid, flush=True)
    time.sleep(100)
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "slow_to_import.py").write_text(MODULE)

    def popen(run, *words, log, imports=("slow_to_import",), own=None):
        env = {"PYTHONPATH": f"{paths.ROOT}:{tmp_path}"}
        return warm.popen(sys.executable, imports, f"slow_to_import:{run}", words, tmp_path / log, env, own)

    return popen


def test_forks_of_one_server_have_their_own_words_variables_logs_and_statuses(start, tmp_path):
    found = {}

    def one(number):
        process = start("run", str(number), "ä b", log=f"logs/{number}.log", own={"OWN": f"own{number}"})
        found[number] = process.wait()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: number for number in range(4)}
    told = [(tmp_path / "logs" / f"{number}.log").read_text().splitlines()[-1].split(";") for number in range(4)]
    assert len({server for server, *_ in told}) == 1 and told[0][0] != str(os.getpid())
    assert [rest for _, *rest in told] == [[str(n), "ä b", f"own{n}", ""] for n in range(4)]
    everything = "".join(file.read_text() for file in (tmp_path / "logs").iterdir())
    assert everything.count("imported") == 1


def test_what_cannot_be_imported_is_told_in_the_log_and_tried_again(start, tmp_path):
    for attempt in (1, 2):
        assert start("run", "0", log="out.log", imports=("nowhere_to_be_found",)).wait() != 0
        assert (tmp_path / "out.log").read_text().count("No module named 'nowhere_to_be_found'") == attempt
    assert start("missing", "0", log="out.log").wait() == 1
    assert "AttributeError" in processes.tail(tmp_path / "out.log")


def test_stopped_it_takes_its_group_along_and_a_killed_server_its_forks(start, tmp_path):
    assert start("run", "0", log="zero.log").wait() == 0  # the import has spoken
    process = start("wait", log="one.log")
    child = told_pid(tmp_path / "one.log")
    processes.stop(process)
    assert process.returncode == -signal.SIGTERM
    wait_until_gone(child)
    process = start("wait", log="two.log")
    told_pid(tmp_path / "two.log")
    psutil.Process(process.pid).parent().kill()
    assert process.wait() == -signal.SIGKILL
    assert start("run", "5", log="three.log").wait() == 5


def test_server_and_fork_die_with_their_killed_parent(start, tmp_path):
    (tmp_path / "slow_to_import.py").write_text(MODULE.replace('print("imported", file=sys.stderr)', ""))
    code = (
        "import sys, time; from pathlib import Path; from caprl_utils.warm import popen;"
        f"log = Path({str(tmp_path / 'out.log')!r});"
        f"p = popen(sys.executable, ['slow_to_import'], 'slow_to_import:wait', [], log, {{}});"
        f"Path({str(tmp_path / 'pid')!r}).write_text(f'{{p.pid}}\\n'); time.sleep(100)"
    )
    env = {**os.environ, "PYTHONPATH": f"{paths.ROOT}:{tmp_path}"}
    parent = subprocess.Popen([sys.executable, "-c", code], env=env)
    fork = told_pid(tmp_path / "pid")
    told_pid(tmp_path / "out.log")
    server = psutil.Process(fork).ppid()
    parent.kill()
    parent.wait()
    wait_until_gone(server)
    wait_until_gone(fork)
