"""Trainings over several nodes: what each of them starts, and when.

Node 0 runs the notebooks. Every other node runs `python -m caprl_utils.rl.ablations --follow --profile PROFILE`, which
starts its part of a training when node 0 has announced it, so that no node waits in vain for a rendezvous. The nodes
share runs/ on a file system that all of them see.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from caprl_utils.errors import UserError
from caprl_utils.files import write_json
from caprl_utils.paths import shown

FOLLOW = "python -m caprl_utils.rl.ablations --follow"
VARIABLES = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
PORT = 29500
_POLL_SEC = 2.0


def rank() -> int:
    """Number of this node; 0 on a single one."""
    return int(os.environ.get(VARIABLES[0], "0"))


def options(config: Path) -> list[str]:
    """What `accelerate launch` has to know of this node, for a config of several.

    Raises UserError when the environment does not say it.
    """
    count = yaml.safe_load(config.read_text(encoding="utf-8"))["num_machines"]
    if count == 1:
        return []
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise UserError(
            f"{shown(config)} is for {count} nodes, and {', '.join(missing)} is not set. Node 0 runs the notebooks "
            f"with NODE_RANK=0, the others `{FOLLOW} --profile PROFILE` with NODE_RANK 1 to {count - 1}; all with "
            "MASTER_ADDR and MASTER_PORT of node 0. `make plan` prints the commands"
        )
    return [
        "--machine_rank", os.environ["NODE_RANK"], "--main_process_ip", os.environ["MASTER_ADDR"],
        "--main_process_port", os.environ["MASTER_PORT"],
    ]  # fmt: skip


@contextmanager
def announced(folder: Path, name: str) -> Iterator[None]:
    """Tell the nodes that follow that a training runs now, as long as it does. Alone, nothing is told."""
    file = _announcement(folder, name)
    if rank() > 0 or VARIABLES[0] not in os.environ:
        yield
        return
    write_json(file, {"attempt": uuid.uuid4().hex})
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def follow(
    folder: Path,
    names: Sequence[str],
    done: Callable[[str], bool],
    start: Callable[[str], None],
    poll_sec: float = _POLL_SEC,
) -> None:
    """Take part in every training of `names` that node 0 announces in `folder`, until all are done.

    done: whether a training has its record. start: run this node's part to its end; its failure is node 0's to tell,
    which announces the training again when it goes on.
    """
    seen: set[str] = set()
    while not all(done(name) for name in names):
        for name in names:
            attempt = _attempt(_announcement(folder, name))
            if attempt is not None and attempt not in seen:
                seen.add(attempt)
                start(name)
        time.sleep(poll_sec)


def _announcement(folder: Path, name: str) -> Path:
    return folder / f"{name}.starting.json"


def _attempt(file: Path) -> str | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["attempt"]
    except (OSError, ValueError):  # none, or half a file on a slow file system
        return None
