"""One worker: claim shards, caption their images, try loops and cut captions again, finish the shards.

Requests stream through the backend across shards, so a server stays full; a shard is finished as soon as its
last caption is there. Every row is on disk as soon as it is final. With backends whose rows do not depend on
their batch (ours) a stopped job ends with the same captions as an undisturbed one.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from caprl_utils.captions.check import places
from caprl_utils.captions.loops import is_loop
from caprl_utils.captions.manifest import Claim, Manifest, read_shard
from caprl_utils.captions.old_images import ImageItem
from caprl_utils.captions.places import Place, in_threads, open_image, reread
from caprl_utils.captions.rows import caption_id, chunk_seed
from caprl_utils.errors import UserError
from caprl_utils.models.base import Backend, Completion, Request, Sampling
from caprl_utils.progress import Progress
from caprl_utils.runs import RowStore

RETRY_TEMPERATURE = 0.7  # ours: at least; a greedy caption would come out the same again
RETRY_REPETITION_PENALTY = 1.05  # ours: at least; the value the paper's question writer uses
FIRST_WAIT_SEC, WAIT_SEC = (
    0.05,
    1.0,
)  # between looks at the shards that others work on: short at first, then longer


class SetRow(BaseModel):
    """One caption of one image: a row of the parquet files.

    id: IMAGE#INDEX. image_key: where the image stands in its source. num_tokens: of the caption, in the
    captioner's own tokens. finish_reason "length": cut at the token limit. looped: it repeats itself. attempts:
    how often it was generated, because the one before was cut or a loop. seed: what this one was drawn with.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    id: str
    image_id: str
    image_key: str
    index: int
    caption: str
    num_tokens: int
    finish_reason: str
    looped: bool
    attempts: int
    seed: int
    model: str
    model_hash: str
    prompt_hash: str

    @property
    def sound(self) -> bool:
        """Neither cut nor a loop."""
        return self.finish_reason == "stop" and not self.looped


SCHEMA = pa.schema(
    [
        ("id", pa.string()), ("image_id", pa.string()), ("image_key", pa.string()), ("index", pa.int32()),
        ("caption", pa.string()), ("num_tokens", pa.int32()), ("finish_reason", pa.string()),
        ("looped", pa.bool_()), ("attempts", pa.int32()), ("seed", pa.int64()), ("model", pa.string()),
        ("model_hash", pa.string()), ("prompt_hash", pa.string()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What a worker does with each image."""

    source: str
    kinds: Sequence[str] | None
    prompt: str
    sampling: Sampling
    retries: int
    skip_duplicates: bool

    @property
    def prompt_hash(self) -> str:
        """Hash of the instruction."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]


@dataclass
class _Shard:
    """A claimed shard with what is still missing."""

    claim: Claim
    store: RowStore
    places: dict[str, Place]
    waiting: set[str] = field(default_factory=set)  # row ids
    bad: dict[str, SetRow] = field(default_factory=dict)  # cut or loops, to be tried again
    failed: dict[str, str] = field(default_factory=dict)
    asked_all: bool = False
    counted: int = 0  # captions that the progress line has


class Worker:
    """Works on a manifest until all shards are finished."""

    def __init__(self, manifest: Manifest, task: Task, captioner: Backend, wait: bool = True) -> None:
        """wait: stay until the shards that other workers hold are finished too, or theirs is taken over."""
        self.manifest, self.task, self.captioner, self.wait = manifest, task, captioner, wait
        self.prompt_hash = task.prompt_hash
        self._open: dict[str, _Shard] = {}  # image id -> its shard
        self._none_yet = True

    def run(self, label: str = "captions") -> None:
        """Caption what is left. Raises UserError when the captioner answers nothing of a whole shard."""
        sizes = [size * self.task.sampling.n for size in self.manifest.shard_sizes]
        with Progress(label, sum(sizes)) as self._progress, self.manifest.heartbeat():
            self._progress.update(sum(sizes[shard] for shard in self.manifest.finished()))
            wait = FIRST_WAIT_SEC
            while True:
                for completion in self.captioner.stream(self._requests(), self.task.sampling):
                    self._take(completion)
                if not self.wait or len(self.manifest.finished()) == self.manifest.num_shards:
                    return
                time.sleep(wait)
                wait = min(2 * wait, WAIT_SEC)

    def _requests(self) -> Iterator[Request]:
        """Requests of all shards that can be had; a shard is claimed when the one before is asked."""
        while (claim := self.manifest.claim()) is not None:
            shard = self._opened(claim)
            todo = [place for name, place in shard.places.items() if self._missing(shard, name)]
            for item in self._images(todo):
                if item.problem is not None:
                    shard.failed[item.id] = f"the image cannot be used: {item.problem}"
                    continue
                shard.waiting |= set(self._missing(shard, item.id))
                self._open[item.id] = shard
                yield Request(item.id, self.task.prompt, item.image)
            shard.asked_all = True
            self._finish_if_done(shard)

    def _opened(self, claim: Claim) -> _Shard:
        rows = places(self.manifest.images, claim.shard)
        good = {
            place.id: place
            for place, problem, same_as in rows
            if problem is None and not (same_as is not None and self.task.skip_duplicates)
        }
        return _Shard(claim, RowStore(claim.rows), good)

    def _missing(self, shard: _Shard, image_id: str) -> list[str]:
        ids = [caption_id(image_id, index) for index in range(self.task.sampling.n)]
        return [row_id for row_id in ids if row_id not in shard.store]

    def _images(self, wanted: Sequence[Place]) -> Iterator[ImageItem]:
        found = in_threads(open_image, reread(self.task.source, wanted, self.task.kinds))
        for place, item in zip(wanted, found, strict=True):
            yield replace(item, id=place.id)

    def _take(self, completion: Completion) -> None:
        shard = self._open.get(completion.id)
        row_id = caption_id(completion.id, completion.index)
        if shard is None or row_id not in shard.waiting:
            return  # made before this worker took the shard
        shard.waiting.discard(row_id)
        shard.counted += 1
        self._progress.update()
        if completion.text is None:
            shard.failed.setdefault(completion.id, completion.error or "the captioner gave no text")
        else:
            row = self._row(shard, completion.id, completion.index, completion, 1, self.task.sampling)
            if row.sound or not self.task.retries:
                shard.store.append(row)
            else:
                shard.bad[row_id] = row
        self._finish_if_done(shard)

    def _finish_if_done(self, shard: _Shard) -> None:
        if shard.asked_all and not shard.waiting:
            self._try_again(shard)
            self._finish(shard)

    def _try_again(self, shard: _Shard) -> None:
        """Draw loops and cut captions anew, with other seeds; where all attempts are bad the first stays."""
        task = self.task
        todo = dict(shard.bad)
        for attempt in range(1, task.retries + 1):
            if not todo:
                break
            sampling = replace(
                task.sampling, n=1, seed=chunk_seed(task.sampling.seed, "again", attempt),
                temperature=max(task.sampling.temperature, RETRY_TEMPERATURE),
                repetition_penalty=max(task.sampling.repetition_penalty, RETRY_REPETITION_PENALTY),
            )  # fmt: skip
            for completion in self.captioner.generate(self._again(shard, todo), sampling):
                first = shard.bad[completion.id]
                row = first.model_copy(update={"attempts": attempt + 1})
                if completion.text is not None:
                    new = self._row(shard, first.image_id, first.index, completion, attempt + 1, sampling)
                    row = new if new.sound else row
                shard.bad[completion.id] = row
                if row.sound:
                    del todo[completion.id]
        for row in shard.bad.values():
            shard.store.append(row)

    def _again(self, shard: _Shard, todo: dict[str, SetRow]) -> list[Request]:
        wanted = {row.image_id for row in todo.values()}
        found = self._images([place for name, place in shard.places.items() if name in wanted])
        images = {item.id: item.image for item in found}
        return [Request(row.id, self.task.prompt, images[row.image_id]) for row in todo.values()]

    def _row(
        self, shard: _Shard, image_id: str, index: int, completion: Completion, attempts: int, used: Sampling
    ) -> SetRow:
        text = completion.text.strip()
        return SetRow(
            id=caption_id(image_id, index), image_id=image_id, image_key=shard.places[image_id].key,
            index=index, caption=text, num_tokens=completion.num_tokens,
            finish_reason=completion.finish_reason, looped=is_loop(text), attempts=attempts, seed=used.seed,
            model=self.captioner.name, model_hash=self.captioner.model_hash, prompt_hash=self.prompt_hash,
        )  # fmt: skip

    def _finish(self, shard: _Shard) -> None:
        shard.store.close()
        rows = {row.id: row for row in shard.store.read(SetRow)}
        if shard.failed and not rows and self._none_yet:
            name, reason = next(iter(shard.failed.items()))
            raise UserError(
                f"none of the first {len(shard.failed)} images was captioned; {name}: {reason}. "
                "Mend the cause and run again; nothing that was finished is lost."
            )
        self._none_yet = self._none_yet and not rows
        ids = [caption_id(name, i) for name in shard.places for i in range(self.task.sampling.n)]
        table = pa.Table.from_pylist([rows[i].model_dump() for i in ids if i in rows], SCHEMA)
        self.manifest.finish(shard.claim, as_parquet(table), shard.failed)
        for name in shard.places:
            self._open.pop(name, None)
        size = self.manifest.shard_sizes[shard.claim.shard] * self.task.sampling.n
        self._progress.update(size - shard.counted)  # bad images, and rows of an earlier worker


def as_parquet(table: pa.Table) -> bytes:
    """The table as the bytes of a parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def rows_of(finished: Path) -> str:
    """A finished shard as JSONL rows, to go on with it. Raises UserError when it is damaged."""
    lines = (SetRow(**row).model_dump_json() for row in read_shard(finished).to_pylist())
    return "".join(line + "\n" for line in lines)
