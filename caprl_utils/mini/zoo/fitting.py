"""The training loop of the zoo: seeded batches, a curve on disk, checkpoints that continue exactly."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.zoo.packing import IGNORED, Batch
from caprl_utils.prompts import ANSWER_PREFILL, LETTERS


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of one lesson: linear warm-up, then cosine down to a ``floor`` share of the rate."""

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 50
    floor: float = 0.1

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (self.floor + (1 - self.floor) * (1 + math.cos(done * math.pi)) / 2)


def loss_of(
    model, batch: Batch, pixels: dict[str, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over the answer tokens of a packed batch, and the tokens predicted there, (answer tokens,)."""
    inputs = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask,
    }
    if pixels is not None:
        inputs |= pixels | {"mm_token_type_ids": (batch.input_ids == model.config.image_token_id).long()}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    wanted = batch.labels[:, 1:]
    learned = wanted != IGNORED
    logits = model.lm_head(hidden[:, :-1][learned])  # (answer tokens, vocabulary)
    return torch.nn.functional.cross_entropy(logits, wanted[learned]), logits.argmax(-1)


def answer_accuracy(batch: Batch, predicted: torch.Tensor) -> dict[str, float]:
    """Shares of predicted answers that are right: ``letters`` of options, and all other ``words``."""
    wanted = batch.labels[:, 1:][batch.labels[:, 1:] != IGNORED]
    tokenizer = shared_tokenizer()
    letters = torch.tensor(tokenizer.convert_tokens_to_ids([f" {letter}" for letter in LETTERS[:5]]))
    frame = torch.tensor(tokenizer.convert_tokens_to_ids([ANSWER_PREFILL, "<|im_end|>"]))
    is_letter = torch.isin(wanted, letters)
    is_word = ~is_letter & ~torch.isin(wanted, frame)
    right = (predicted == wanted).float()
    shares = {"letters": right[is_letter], "words": right[is_word]}
    return {name: share.mean().item() for name, share in shares.items() if len(share)}


class Fit:
    """Trains ``model`` in ``folder``; run again after any stop, it goes on from its last checkpoint."""

    def __init__(self, model, folder: Path, schedule: Schedule, save_every: int = 100) -> None:
        self.model, self.folder, self.schedule, self.save_every = model, folder, schedule, save_every
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=0.0)
        self.state = {"level": 0, "recent": 0.0}
        self.step = self._resume()

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _resume(self) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._checkpoint.exists():
            (self.folder / "curve.jsonl").unlink(missing_ok=True)
            return 0
        saved = torch.load(self._checkpoint, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state = saved["state"]
        self._cut_curve(saved["step"])
        return saved["step"]

    def _cut_curve(self, step: int) -> None:
        """Drop rows that a stop left behind after the checkpoint: their steps are taken again."""
        curve = self.folder / "curve.jsonl"
        rows = [line for line in curve.read_text().splitlines(keepends=True) if line.endswith("\n")]
        curve.write_text("".join(line for line in rows if json.loads(line)["step"] < step))

    def _save(self) -> None:
        saved = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        temporary = self._checkpoint.with_suffix(".tmp")
        torch.save(saved | {"state": self.state, "step": self.step}, temporary)
        os.replace(temporary, self._checkpoint)

    def run(
        self, lesson: Callable[[int, dict], tuple[torch.Tensor, dict[str, float]]], steps: int | None = None
    ) -> None:
        """Take steps to the schedule's end (or ``steps``); ``lesson(step, state)`` gives loss and curve figures."""
        self.model.train()
        last = steps or self.schedule.steps
        while self.step < last:
            started = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule.rate(self.step)
            loss, figures = lesson(self.step, self.state)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self._log(loss.item(), figures, time.perf_counter() - started)
            self.step += 1
            if self.step % self.save_every == 0 or self.step == last:
                self._save()

    def _log(self, loss: float, figures: dict[str, float], seconds: float) -> None:
        row = {"step": self.step, "loss": round(loss, 5), **{k: round(v, 4) for k, v in figures.items()}}
        row["seconds"] = round(seconds, 3)
        with open(self.folder / "curve.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if self.step % 20 == 0:
            print(f"{self.folder.name} {json.dumps(row)}", flush=True)
