"""Who works on which shard, agreed upon through files in one folder, by processes of one or many machines.

    job.json                 what the captions are made with, and of what; images.parquet: the checked images
    claims/00007.json        a worker has shard 7; the file's time says that it is alive
    shards/00007.TOKEN.jsonl the rows it has made so far; a worker that takes over keeps them
    shards/00007.parquet     shard 7 is finished
    failed/00007.jsonl       its images without a caption, with the reason; the next run tries them again

Claims and finishes happen under one lock (flock; a shared file system must support it), so no shard is given
to two workers, and a worker that was taken for dead cannot finish its shard a second time.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic, write_json
from caprl_utils.paths import shown

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)
HEARTBEAT_SEC = 10.0
STALE_SEC = 120.0  # ours: a worker of another machine that was silent so long is dead
_SHARD_REMEDY = "delete it and run again: only that shard is captioned again"


@dataclass(frozen=True)
class Claim:
    """The right to work on one shard."""

    shard: int
    token: str
    rows: Path = field(compare=False)


class Manifest:
    """The folder of one job (see the module)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[int, Claim] = {}
        self._stop = threading.Event()

    @property
    def images(self) -> Path:
        """The table of checked images."""
        return self.folder / "images.parquet"

    @cached_property
    def num_shards(self) -> int:
        """Shards of the job."""
        import pyarrow.parquet as pq

        return pq.ParquetFile(self.images).metadata.num_row_groups

    @cached_property
    def shard_sizes(self) -> list[int]:
        """Images of each shard, bad ones included."""
        import pyarrow.parquet as pq

        metadata = pq.ParquetFile(self.images).metadata
        return [metadata.row_group(shard).num_rows for shard in range(metadata.num_row_groups)]

    def finished(self) -> set[int]:
        """Shards that are done."""
        return {int(file.stem) for file in (self.folder / "shards").glob("*.parquet")}

    def shard_file(self, shard: int) -> Path:
        """The finished captions of a shard."""
        return self.folder / "shards" / f"{shard:05d}.parquet"

    def failed_file(self, shard: int) -> Path:
        """The images of a shard that have no caption."""
        return self.folder / "failed" / f"{shard:05d}.jsonl"

    @contextmanager
    def locked(self, name: str = "lock") -> Iterator[float]:
        """Hold one of the folder's locks; gives the time as the folder's file system has it."""
        path = self.folder / f".{name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.utime(path)
            yield os.stat(path).st_mtime

    def claim(self) -> Claim | None:
        """A shard that nobody works on, or None. A dead worker's shard comes with the rows it had made."""
        with self.locked() as now:
            done = self.finished()
            for shard in range(self.num_shards):
                if shard not in done and shard not in self._held and self._is_free(shard, now):
                    return self._take(shard)
        return None

    def finish(self, claim: Claim, captions: bytes, failed: Mapping[str, str]) -> bool:
        """Write the shard for good; False when another worker has taken it over in the meantime."""
        with self.locked():
            self._held.pop(claim.shard, None)
            if self._owner(claim.shard).get("token") != claim.token:
                claim.rows.unlink(missing_ok=True)
                return False
            if failed:
                lines = (json.dumps({"id": k, "reason": v}, ensure_ascii=False) for k, v in failed.items())
                write_atomic(self.failed_file(claim.shard), "\n".join(lines) + "\n")
            else:
                self.failed_file(claim.shard).unlink(missing_ok=True)
            write_atomic(self.shard_file(claim.shard), captions)
            for rows in self._row_files(claim.shard):
                rows.unlink()
            self._claim_file(claim.shard).unlink()
        return True

    def release(self, claim: Claim) -> None:
        """Give a shard back unfinished; its rows stay for the next worker."""
        with self.locked():
            self._held.pop(claim.shard, None)
            if self._owner(claim.shard).get("token") == claim.token:
                self._claim_file(claim.shard).unlink()

    def reopen_failed(self, keep: Callable[[Path], str]) -> int:
        """Make shards with failed images unfinished again; `keep` turns a finished shard into JSONL rows.

        Returns how many images will be tried again.
        """
        images = 0
        with self.locked():
            for file in sorted((self.folder / "failed").glob("*.jsonl")):
                shard, finished = int(file.stem), self.shard_file(int(file.stem))
                if finished.exists():
                    write_atomic(self._rows_file(shard, secrets.token_hex(4)), keep(finished))
                    finished.unlink()
                images += len(file.read_bytes().splitlines())
                file.unlink()
        return images

    @contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Keep the claims that this object holds alive as long as the block lasts."""
        thread = threading.Thread(target=self._beat, name="caprl-claims", daemon=True)
        self._stop.clear()
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            for claim in list(self._held.values()):
                self.release(claim)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SEC):
            for claim in list(self._held.values()):
                try:
                    os.utime(self._claim_file(claim.shard))
                except FileNotFoundError:
                    continue  # finished this moment
                except OSError as error:  # a network file system: the next beat may come through
                    log.warning("the claim of shard %d could not be kept alive: %s", claim.shard, error)

    def _claim_file(self, shard: int) -> Path:
        return self.folder / "claims" / f"{shard:05d}.json"

    def _rows_file(self, shard: int, token: str) -> Path:
        return self.folder / "shards" / f"{shard:05d}.{token}.jsonl"

    def _row_files(self, shard: int) -> list[Path]:
        return sorted((self.folder / "shards").glob(f"{shard:05d}.*.jsonl"))

    def _owner(self, shard: int) -> dict[str, Any]:
        """The claim of a shard; empty without one, or where a crash of the machine left half a file."""
        try:
            return json.loads(self._claim_file(shard).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}

    def _is_free(self, shard: int, now: float) -> bool:
        owner = self._owner(shard)
        if not owner:
            return True
        if all(owner.get(name) == value for name, value in _machine().items()):
            started = _start_time(owner["pid"])
            return started is None or abs(started - owner["started"]) > 2  # the boot time moves a little
        try:
            return now - self._claim_file(shard).stat().st_mtime > STALE_SEC
        except FileNotFoundError:
            return True

    def _take(self, shard: int) -> Claim:
        token = secrets.token_hex(4)
        claim = Claim(shard, token, self._rows_file(shard, token))
        pid = os.getpid()
        owner = {"token": token, **_machine(), "pid": pid, "started": _start_time(pid)}
        earlier = [line for file in self._row_files(shard) for line in _whole_lines(file)]
        if earlier:
            write_atomic(claim.rows, b"".join(_first_of_each(earlier)))
            for file in self._row_files(shard):
                if file != claim.rows:
                    file.unlink()
        write_json(self._claim_file(shard), owner)
        self._held[shard] = claim
        return claim


def read_failed(folder: Path) -> dict[str, str]:
    """Image id -> reason, of all finished shards."""
    lines = [line for file in sorted((folder / "failed").glob("*.jsonl")) for line in _whole_lines(file)]
    rows = [json.loads(line) for line in lines]
    return {row["id"]: row["reason"] for row in rows}


def _whole_lines(file: Path) -> list[bytes]:
    """Lines of a JSONL file that another process wrote; a last one that was cut off is left out."""
    return [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _first_of_each(lines: list[bytes]) -> list[bytes]:
    kept: dict[str, bytes] = {}
    for line in lines:
        kept.setdefault(json.loads(line)["id"], line)
    return list(kept.values())


def _machine() -> dict[str, str]:
    """What process numbers can be compared within: two containers may share a host name, not all of these."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        boot = space = ""
    return {"host": socket.gethostname(), "boot": boot, "pid_space": space}


def _start_time(pid: int) -> float | None:
    """When a process of this machine was started; None when it is gone (a number may be given out again)."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


@contextmanager
def readable(file: Path, remedy: str = _SHARD_REMEDY) -> Iterator[None]:
    """Turn what pyarrow says of a damaged parquet file into a UserError naming it and the remedy."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{shown(file)} is half-written or damaged ({reason}); {remedy}") from None


def read_shard(file: Path) -> pa.Table:
    """A finished shard, its checksums verified. Raises UserError when it is damaged, anywhere in the file."""
    import pyarrow.parquet as pq

    with readable(file):
        return pq.ParquetFile(file, page_checksum_verification=True).read()
