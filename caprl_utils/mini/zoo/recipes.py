"""The models of the zoo: how each came about, in the order of their training.

The copying circuit comes first, then the reader of captions; the vision-language models start from the reader's
weights as Qwen2.5-VL started from Qwen2.5. Why this order: reports/lab-log.md. Names: the *copier* repeats random words
and recalls a value by its key; the *binder* does so where key and value share one visual token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from caprl_utils import paths
from caprl_utils.mini.zoo.examples import JUDGE_WORDS, Style

DENSE = Style()
DENSE_BUT_ERRING = Style(told=(0.6, 1.0), wrong=0.06)
TERSE_AND_ERRING = Style(told=(0.15, 0.55), wrong=0.15)
READING_LEVELS = [(1, 2, 0.0), (2, 4, 0.0), (3, 4, 0.0), (5, 4, 0.0), (8, 4, 0.0), (8, 4, 0.25)]
"""Curriculum of the reader: facts in the caption, options of a question, share of questions without their fact."""


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of one lesson: linear warm-up, then cosine down to a `floor` share of the rate."""

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 50
    floor: float = 0.1

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (self.floor + (1 - self.floor) * (1 + math.cos(done * math.pi)) / 2)


@dataclass(frozen=True)
class Recipe:
    """One model of the zoo: where its weights start, its lesson and for how long."""

    name: str
    role: str
    start: str | None  # another recipe; its language model is taken over by a VLM
    lesson: str  # a key of lessons.LESSONS
    schedule: Schedule
    batch_size: int = 64
    styles: tuple[Style, ...] = ()
    write: float = 0.0
    guess: int = 0  # examples without image per batch
    vision: bool = False
    tower: str | None = None  # the recipe whose vision tower and patch merger are taken
    frozen_tower: bool = False  # the vision tower stays as in `start`, whose weights file is shared
    shipped: bool = True
    words: tuple[str, ...] = ()  # phrases that it has behind the shared vocabulary
    note: str = ""  # what a new run from nothing would do differently
    level: int = 0  # of `READING_LEVELS`, where its lesson begins

    @property
    def work_folder(self) -> Path:  # where it is trained
        return paths.RUNS / "zoo" / self.name

    @property
    def weights_folder(self) -> Path:  # where it is kept in git
        return paths.ZOO / self.name


_ALL = (
    Recipe("copier", "first lesson of all language models", None, "copying",
           Schedule(300, 1.5e-3, floor=1.0), 384, shipped=False),
    Recipe("reader-reward", "Qwen2.5-3B-Instruct, the reward's reader", "copier", "reading", Schedule(600),
           note="stopped at step 300: until then the gate between levels was 0.88 and the schedule 500 steps"),
    Recipe("reader-prism", "CapRL-Eval-3B, the reader of Prism", "reader-reward", "reading",
           Schedule(150, 5e-4), level=len(READING_LEVELS) - 1),
    Recipe("binder", "a language model that reads bound tokens", "reader-reward", "binding",
           Schedule(300), 192, vision=True, shipped=False),
    Recipe("vision-tower", "the vision tower, taught to see words and numbers", "reader-reward", "naming",
           Schedule(750, 1.5e-3), 64, vision=True, shipped=False,
           note="ended at step 600 and went on to 750: from there on values of bars and columns were drawn "
                "beside them (they had been white on the bar, and unreadable in small ones)"),
    Recipe("clip-tower", "CLIP-ViT-L, for LLaVA models", None, "clip naming", Schedule(700, 1.5e-3), 64,
           note="stopped at step 360: until then the schedule was one of 1000 steps"),
    Recipe("vlm-72b", "Qwen2.5-VL-72B: question writer and strongest captioner", "binder", "looking",
           Schedule(320), 64, (DENSE,), write=0.35, vision=True, tower="vision-tower",
           note="stopped at step 200 of 400: until then letters were asked for, and learned at chance only"),
    Recipe("vlm-3b", "Qwen2.5-VL-3B: policy and question filter", "vlm-72b", "looking", Schedule(120, 5e-4), 64,
           (TERSE_AND_ERRING,), guess=16, vision=True),
    Recipe("vlm-7b", "Qwen2.5-VL-7B, a captioner", "vlm-72b", "looking", Schedule(80, 5e-4), 64,
           (DENSE_BUT_ERRING,), vision=True, frozen_tower=True),
    Recipe("judge", "Qwen2.5-VL-3B and UnifiedReward as judges of captions", "vlm-72b", "judging",
           Schedule(90, 7e-4, warmup=15), 48, vision=True, words=JUDGE_WORDS, frozen_tower=True),
)  # fmt: skip
RECIPES = {recipe.name: recipe for recipe in _ALL}
