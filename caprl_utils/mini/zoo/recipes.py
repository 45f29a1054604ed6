"""The models of the zoo: how each came about, in the order of their training.

The copying circuit comes first, then the reader of captions; the vision-language models start from a reader's weights
as Qwen2.5-VL started from Qwen2.5. Why this order: reports/lab-log.md. Names: the *copier* repeats random words and
recalls a value by its key; the *binder* does so where key, value and the next key share one visual token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from caprl_utils import paths
from caprl_utils.mini.zoo.examples import Style

ALT_TEXT = Style(stop=0.45, false=0.01)
DENSE = Style()
WARMUP = 50  # steps


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of one lesson: linear warm-up, then cosine down to a `floor` share of the rate."""

    steps: int
    learning_rate: float = 1e-3
    floor: float = 0.1
    muon: float | None = None  # rate of the matrices between layers, as a multiple; they are Muon's then

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        if step < WARMUP:
            return self.learning_rate * (step + 1) / WARMUP
        done = (step - WARMUP) / max(1, self.steps - WARMUP)
        return self.learning_rate * (self.floor + (1 - self.floor) * (1 + math.cos(done * math.pi)) / 2)


@dataclass(frozen=True)
class Recipe:
    """One model of the zoo: where its weights start, its lesson and for how long."""

    name: str
    role: str
    starts_from: str | None  # another recipe; its language model is taken over by a VLM
    lesson: str  # a key of lessons.LESSONS
    schedule: Schedule
    batch_size: int = 64
    width: int = 128  # of the language model, in heads of 32
    layers: int = 5  # of the language model; those beyond `start`'s begin as doing nothing
    styles: tuple[Style, ...] = ()
    write: float = 0.0
    guess: int = 0  # examples without image per batch
    pictures: str = "all"  # a key of `pool.PARTS`
    vision: bool = False
    vision_layers: int = 6
    tower: str | None = None  # the recipe whose vision tower and patch merger are taken, and stay as they are
    shipped: bool = True
    note: str = ""  # what a new run from nothing would do differently

    @property
    def work_folder(self) -> Path:  # where it is trained
        return paths.RUNS / "zoo" / self.name

    @property
    def weights_folder(self) -> Path:  # where it is kept in git
        return paths.ZOO / self.name


_ALL = (
    Recipe("copier", "first lesson of the language models", None, "copying",
           Schedule(400, 1.5e-3, floor=1.0), 384, shipped=False),
    Recipe("reader-reward", "Qwen2.5-3B-Instruct, the reward's reader", "copier", "reading", Schedule(1500),
           note="its first 1,300 steps had other schedules, and a third phrasing that told the value first"),
    Recipe("copier-wide", "first lesson of the other reader", None, "copying",
           Schedule(400, 1.5e-3, floor=1.0), 384, width=160, shipped=False),
    Recipe("reader-prism", "CapRL-Eval-3B, the reader of Prism", "copier-wide", "reading", Schedule(1300), width=160,
           note="its first 1,000 steps had other schedules, and a third phrasing that told the value first"),
    Recipe("binder", "a language model that reads bound tokens", "reader-reward", "binding",
           Schedule(300, muon=3.0), 128, vision=True, shipped=False),
    Recipe("speller", "a vision tower that reads words", "copier", "spelling",
           Schedule(400, 1.5e-3, floor=0.5, muon=3.3), 64, vision=True, vision_layers=4, shipped=False,
           note="its schedule was one of 500 steps; stopped at 400"),
    Recipe("namer", "a vision tower that begins to see facts", "copier", "naming",
           Schedule(800, 1.5e-3, muon=3.3), 64, vision=True, vision_layers=4, tower="speller", shipped=False,
           note="its schedule was one of 1,500 steps; stopped at 800, when labels were read and far values were not"),
    Recipe("seer", "a vision tower that sees most facts", "copier", "naming",
           Schedule(3000, 1e-3, muon=2.5), 64, vision=True, tower="namer", shipped=False),
    Recipe("vision-tower", "the vision tower, taught to see facts", "copier", "naming",
           Schedule(1500, 8e-4, muon=2.5), 64, vision=True, tower="seer", shipped=False, pictures="hard"),
    Recipe("clip-tower", "CLIP-ViT-L, for LLaVA models", "copier", "clip naming", Schedule(700, 1.5e-3, muon=3.3), 64),
    Recipe("imaginer", "alt texts and short questions from ideal visual tokens", "binder", "imagining",
           Schedule(400, muon=2.0), 64, styles=(ALT_TEXT,), vision=True, shipped=False),
    Recipe("base-draft", "the base before its end", "imaginer", "looking", Schedule(720, 7e-4), 64,
           styles=(ALT_TEXT,) * 3, guess=16, vision=True, tower="vision-tower", pictures="fresh", shipped=False,
           note="in its first 480 steps a picture had one alt text, and in the first 320, the imaginer and mid at most "
           "five statements"),
    Recipe("mid-draft", "the mid captioner before its end", "imaginer", "looking", Schedule(250, 6e-4), 64, layers=6,
           styles=(ALT_TEXT, DENSE), vision=True, tower="vision-tower", pictures="fresh", shipped=False),
    Recipe("strong-draft", "the strong captioner before its end", "imaginer", "looking", Schedule(800, 7e-4), 64,
           layers=7, styles=(DENSE,), write=0.35, vision=True, tower="vision-tower", pictures="fresh", shipped=False),
    Recipe("base", "Qwen2.5-VL-3B: policy and question filter", "base-draft", "finishing", Schedule(200, 2e-4),
           styles=(ALT_TEXT,) * 3, guess=16, vision=True, tower="vision-tower", pictures="last"),
    Recipe("mid", "Qwen2.5-VL-7B, a captioner", "mid-draft", "finishing", Schedule(200, 2e-4), layers=6,
           styles=(ALT_TEXT, DENSE), vision=True, tower="vision-tower", pictures="last"),
    Recipe("strong", "Qwen2.5-VL-72B: question writer and strongest captioner", "strong-draft", "finishing",
           Schedule(400, 4e-4), layers=7, styles=(DENSE,), write=0.35, vision=True, tower="vision-tower",
           pictures="last"),
    Recipe("judge", "Qwen2.5-VL-3B and UnifiedReward as judges of captions, and the verifier", "strong-draft",
           "judging", Schedule(900, 1e-3, muon=2.5), 24, layers=9, vision=True, tower="vision-tower", pictures="fresh"),
)  # fmt: skip
RECIPES = {recipe.name: recipe for recipe in _ALL}
TOWER_HOME = "base"
"""The model whose folder holds the vision tower that all of them share; the others have a link to it."""
