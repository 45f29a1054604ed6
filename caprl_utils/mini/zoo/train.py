"""The model zoo: how each small model came about, and the command that trains it again.

`make zoo` trains what is missing, in order, from nothing; stop it at any time and run it again.
The copying circuit comes first, then the reader of captions; the vision-language models start from the reader's
weights as Qwen2.5-VL started from Qwen2.5. Why this order: reports/lab-log.md.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from caprl_utils import paths
from caprl_utils.hashing import derive_seed
from caprl_utils.mini.render import render
from caprl_utils.mini.tokenizer import shared_tokenizer, told_keys
from caprl_utils.mini.world import KINDS, Picture, picture
from caprl_utils.mini.zoo import clip_lesson, judge_lesson, lessons, models
from caprl_utils.mini.zoo.fitting import Fit, Schedule, answer_accuracy, loss_of
from caprl_utils.mini.zoo.lessons import Style
from caprl_utils.mini.zoo.packing import (
    IMAGE_PREFIX,
    IMAGE_TOKENS_PER_SIDE,
    Batch,
    Packed,
    collate,
    image_positions,
)

DENSE = Style()
DENSE_BUT_ERRING = Style(told=(0.6, 1.0), wrong=0.06)
TERSE_AND_ERRING = Style(told=(0.15, 0.55), wrong=0.15)
READING_LEVELS = [(1, 2, 0.0), (2, 4, 0.0), (3, 4, 0.0), (5, 4, 0.0), (8, 4, 0.0), (8, 4, 0.25)]
"""Curriculum of the reader: facts in the caption, options of a question, share of questions without their fact."""
LEVEL_UP = 0.82  # letter accuracy (running mean) at which the next level starts


@dataclass(frozen=True)
class Recipe:
    """One model of the zoo: where its weights start, its lesson and for how long."""

    name: str
    role: str
    start: str | None  # another recipe; its language model is taken over by a VLM
    lesson: str  # a key of LESSONS
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
    options: dict = field(default_factory=dict)


RECIPES = {
    r.name: r
    for r in (
        Recipe("copier", "first lesson of all language models", None, "copying",
               Schedule(300, 1.5e-3, floor=1.0), 384, shipped=False),
        Recipe("reader-reward", "Qwen2.5-3B-Instruct, the reward's reader", "copier", "reading", Schedule(600),
               note="stopped at step 300: until then the gate between levels was 0.88 and the schedule 500 steps"),
        Recipe("reader-prism", "CapRL-Eval-3B, the reader of Prism", "reader-reward", "reading",
               Schedule(150, 5e-4), options={"level": len(READING_LEVELS) - 1}),
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
               Schedule(90, 7e-4, warmup=15), 48, vision=True, words=judge_lesson.WORDS, frozen_tower=True),
    )
}  # fmt: skip


def work_folder(name: str) -> Path:
    return paths.RUNS / "zoo" / name


def weights_folder(name: str) -> Path:
    return paths.ROOT / "caprl_utils" / "mini" / "weights" / name


TOWER_FILE, LANGUAGE_FILE = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

Lesson = Callable[[int, dict], tuple[torch.Tensor, dict[str, float]]]
"""(step, state that checkpoints keep) -> loss and figures for the curve."""

# --- lessons -------------------------------------------------------


def copying_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """Three habits on random words: to repeat a stretch, then to recall a value by its key and name an option's letter.

    Repeating comes first and is asked of the second layer, so that the layers above can build on it. Pairs and options
    grow from two to five.
    """
    size = len(shared_tokenizer()) - len(told_keys())

    def lesson(step: int, state: dict) -> tuple[torch.Tensor, dict[str, float]]:
        rng = random.Random(derive_seed("zoo", recipe.name, step))
        ready = state.get("after", 0.0) > LEVEL_UP
        rows = [lessons.repeated(rng, size) for _ in range(recipe.batch_size // (6 if ready else 3))]
        ids, copied = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])[:, 1:]
        early = model.model(input_ids=ids, output_hidden_states=True).hidden_states[2]
        logits, wanted = model.lm_head(model.model.norm(early)[:, :-1][copied]), ids[:, 1:][copied]
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        state["after"] = (logits.argmax(-1) == wanted).float().mean().item()
        figures = {"after": state["after"], "level": state["level"]}
        if not ready:
            return loss, figures
        for name, habit in (("recall", lessons.recalled), ("letters", lessons.lettered)):
            rows = torch.tensor([habit(rng, size, 2 + state["level"]) for _ in range(recipe.batch_size)])
            last = model(input_ids=rows).logits[:, -2]
            loss = loss + torch.nn.functional.cross_entropy(last, rows[:, -1])
            figures[name] = (last.argmax(-1) == rows[:, -1]).float().mean().item()
        state["recent"] = 0.9 * state["recent"] + 0.1 * min(figures["letters"], figures["recall"])
        if state["recent"] > LEVEL_UP and state["level"] + 2 < lessons.MOST_OPTIONS:
            state.update(level=state["level"] + 1, recent=0.5)
        return loss, figures

    return lesson


def reading_examples(recipe: Recipe, step: int, level: int) -> list[Packed]:
    """The reader's batch of a step: mostly of the current level, a fifth from the levels before."""
    rng = random.Random(derive_seed("zoo", recipe.name, step))
    examples = []
    for number in range(recipe.batch_size):
        chosen = level if rng.random() < 0.8 else rng.randint(0, level)
        most, num_options, missing = READING_LEVELS[chosen]
        shown = picture("zoo", derive_seed(recipe.name, step, number) % 10**6, rng.choice(KINDS))
        examples.append(
            lessons.reading(rng, shown, rng.randint(max(1, most // 2), most), num_options, missing)
        )
    return examples


def reading_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """Answers about captions, with the curriculum of :data:`READING_LEVELS`."""

    def lesson(step: int, state: dict) -> tuple[torch.Tensor, dict[str, float]]:
        level = max(state["level"], recipe.options.get("level", 0))
        batch = collate(reading_examples(recipe, step, level), shared_tokenizer())
        loss, predicted = loss_of(model, batch)
        figures = answer_accuracy(batch, predicted)
        state["recent"] = 0.9 * state["recent"] + 0.1 * figures["letters"]
        if state["recent"] > LEVEL_UP and level < len(READING_LEVELS) - 1:
            state.update(level=level + 1, recent=0.5)
        return loss, figures | {"level": level}

    return lesson


def binding_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """To read visual tokens that are the sum of a key and a value, as the vision tower makes them: before any picture.

    The sums of random words stand in some of the 25 cells, noise in all, at the positions that visual tokens have: each
    of the three was needed (reports/lab-log.md). Asked in two forms: the value right after the key, as a caption tells
    it, and after "? key The answer is". The embeddings stay as they are.
    """
    table = model.get_input_embeddings()
    table.weight.requires_grad_(False)
    size = len(shared_tokenizer()) - len(told_keys())
    _, _, (mark, prefill) = lessons.letter_ids()
    head, end = (
        shared_tokenizer()(IMAGE_PREFIX).input_ids[:3],
        shared_tokenizer().convert_tokens_to_ids("<|vision_end|>"),
    )

    def answers(
        rng: random.Random, num_pairs: int, tail: list[int | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [lessons.bound(rng, size, num_pairs) for _ in range(recipe.batch_size)]
        keys, values, asked, wanted = (torch.tensor(part) for part in zip(*rows, strict=True))
        cells = torch.stack([torch.randperm(IMAGE_TOKENS_PER_SIDE**2)[:num_pairs] for _ in rows])
        seen = torch.randn(len(rows), IMAGE_TOKENS_PER_SIDE**2, table.embedding_dim) * rng.choice(
            (0.01, 0.02, 0.04)
        )
        seen.scatter_add_(
            1, cells[..., None].expand(-1, -1, table.embedding_dim), table(keys) + table(values)
        )
        query = torch.stack([asked if t is None else torch.full_like(asked, t) for t in [end, *tail]], dim=1)
        opening = table(torch.tensor(head)).expand(len(rows), -1, -1)
        embedded = torch.cat([opening, seen, table(query)], dim=1)
        positions = image_positions(torch.arange(embedded.shape[1]).expand(len(rows), -1))
        hidden = model.model.language_model(inputs_embeds=embedded, position_ids=positions).last_hidden_state
        return model.lm_head(hidden[:, -1]), wanted

    def lesson(step: int, state: dict) -> tuple[torch.Tensor, dict[str, float]]:
        rng = random.Random(derive_seed("zoo", recipe.name, step))
        torch.manual_seed(derive_seed("zoo", recipe.name, step) % 2**31)
        loss, figures = torch.zeros(()), {"level": state["level"]}
        for name, tail in (("caption", [mark, None]), ("answer", [mark, None, mark, prefill])):
            logits, wanted = answers(rng, rng.randint(2, 2 + state["level"]), tail)
            loss = loss + torch.nn.functional.cross_entropy(logits, wanted)
            figures[name] = (logits.argmax(-1) == wanted).float().mean().item()
        state["recent"] = 0.9 * state["recent"] + 0.1 * min(figures["caption"], figures["answer"])
        if state["recent"] > LEVEL_UP and state["level"] < 6:
            state.update(level=state["level"] + 1, recent=0.5)
        return loss, figures

    return lesson


def naming_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """The facts that grid cells stand for, as words of the language model's own (frozen) embeddings (see `naming`)."""
    words = model.get_input_embeddings().weight.detach()
    batches = _ahead(lambda step: _named(recipe, step, pixels_of, len(words)), first_step)

    def lesson(step: int, state: dict) -> tuple[torch.Tensor, dict[str, float]]:
        pixels, wanted = next(batches)
        seen = torch.cat(list(model.model.get_image_features(**pixels).pooler_output))
        return clip_lesson.naming_loss(seen, wanted, words)

    return lesson


def clip_naming_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """The same for the small CLIP tower and its projector."""
    batches = _ahead(lambda step: _named(recipe, step, clip_lesson.clip_pixels, len(model.words)), first_step)

    def lesson(step: int, state: dict) -> tuple[torch.Tensor, dict[str, float]]:
        pixels, wanted = next(batches)
        return clip_lesson.naming_loss(model(pixels), wanted, model.words)

    return lesson


def _named(recipe: Recipe, step: int, pixels: Callable, num_words: int) -> tuple:
    """Pixels of a step's pictures, and the words that their cells stand for."""
    shown = [picture("zoo", derive_seed(recipe.name, step, n) % 10**6) for n in range(recipe.batch_size)]
    return pixels(shown), clip_lesson.word_targets(shown, num_words)


def looking_batch(recipe: Recipe, step: int) -> tuple[Batch, dict[str, torch.Tensor], Batch | None]:
    """Pictures, their packed lessons and pixels, and lessons without pictures, for one step of a VLM."""
    rng = random.Random(derive_seed("zoo", recipe.name, step))
    shown = [picture("zoo", derive_seed(recipe.name, step, n) % 10**6) for n in range(recipe.batch_size)]
    packed = [lessons.looking(rng, p, recipe.styles, write=recipe.write) for p in shown]
    blind = [lessons.guessing(rng, p) for p in shown[: recipe.guess]]
    tokenizer = shared_tokenizer()
    return (
        collate(packed, tokenizer, with_image=True),
        pixels_of(shown),
        collate(blind, tokenizer, text_positions_of_vlm=True) if blind else None,
    )


def pixels_of(pictures: list[Picture]) -> dict[str, torch.Tensor]:
    """Vision inputs of rendered pictures, by the real image processor."""
    import numpy as np

    arrays = np.stack([np.asarray(render(p)) for p in pictures])
    return dict(
        models.image_processor()(images=torch.from_numpy(arrays).permute(0, 3, 1, 2), return_tensors="pt")
    )


def _ahead(make: Callable[[int], tuple], first: int) -> Iterator[tuple]:
    """Results of ``make(first)``, ``make(first + 1)``, ... with the next one always under way in a thread."""
    with ThreadPoolExecutor(1) as pool:
        coming: Future = pool.submit(make, first)
        while True:
            first += 1
            ready, coming = coming, pool.submit(make, first)
            yield ready.result()


def looking_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """Captions, questions and question writing about rendered pictures."""
    batches = _ahead(lambda step: looking_batch(recipe, step), first_step)

    def lesson(step: int, state: dict) -> tuple[torch.Tensor, dict[str, float]]:
        batch, pixels, blind = next(batches)
        loss, predicted = loss_of(model, batch, pixels)
        figures = answer_accuracy(batch, predicted)
        if blind is not None:
            blind_loss, blind_predicted = loss_of(model, blind)
            loss = loss + 0.3 * blind_loss
            figures["blind"] = answer_accuracy(blind, blind_predicted)["words"]
        return loss, figures

    return lesson


def judging_lesson(model, recipe: Recipe, first_step: int) -> Lesson:
    """Ratings of captions beside their pictures (see :mod:`caprl_utils.mini.zoo.judge_lesson`)."""

    def make(step: int) -> tuple[Batch, dict[str, torch.Tensor]]:
        rng = random.Random(derive_seed("zoo", recipe.name, step))
        shown = [picture("zoo", derive_seed(recipe.name, step, n) % 10**6) for n in range(recipe.batch_size)]
        packed = [judge_lesson.judged(rng, p) for p in shown]
        return collate(packed, judge_lesson.judge_tokenizer(), with_image=True), pixels_of(shown)

    batches = _ahead(make, first_step)

    def lesson(step: int, state: dict) -> tuple[torch.Tensor, dict[str, float]]:
        batch, pixels = next(batches)
        loss, predicted = loss_of(model, batch, pixels)
        return loss, judge_lesson.score_accuracy(batch, predicted)

    return lesson


LESSONS = {
    "judging": judging_lesson,
    "copying": copying_lesson,
    "reading": reading_lesson,
    "binding": binding_lesson,
    "naming": naming_lesson,
    "clip naming": clip_naming_lesson,
    "looking": looking_lesson,
}

# --- building, training, shipping -----------------------------------------------------------------------------------


def untrained(recipe: Recipe, words: bool = True):
    """The model of a recipe with fresh weights, with its own words or without."""
    seed = derive_seed("zoo", recipe.name) % 2**31
    if recipe.lesson == "clip naming":
        return clip_lesson.clip_reader(seed)
    model = models.build_vlm(seed) if recipe.vision else models.build_language_model(seed)
    return models.widen(model, len(recipe.words)) if words and recipe.words else model


def build(recipe: Recipe):
    """The model of a recipe with the weights it starts from."""
    model = untrained(recipe, words=False)
    if recipe.start is None:
        return model
    donor = torch.load(work_folder(recipe.start) / "model.pt", weights_only=True)
    if recipe.start == "copier":
        _equate(donor["model.embed_tokens.weight"])
    if recipe.vision and not RECIPES[recipe.start].vision:
        _take_language(model, donor)
    else:
        model.load_state_dict(donor)
    return models.widen(model, len(recipe.words)) if recipe.words else model


def _take_language(vlm, donor: dict[str, torch.Tensor]) -> None:
    """Replace the language model of a VLM by a text model's weights."""
    language = {k.removeprefix("model."): v for k, v in donor.items() if k.startswith("model.")}
    vlm.model.language_model.load_state_dict(language)
    vlm.lm_head.load_state_dict({"weight": donor["lm_head.weight"]})


def _equate(embeddings: torch.Tensor) -> None:
    """Start the fused key words (" Rome is") from the words that questions use (" Rome"), in place."""
    convert = shared_tokenizer().convert_tokens_to_ids
    for told, asked in told_keys().items():
        embeddings[convert(told)] = embeddings[convert(asked)]


def train(recipe: Recipe, steps: int | None = None, folder: Path | None = None):
    """Train one recipe (or its first ``steps``) in ``folder``; returns the model."""
    folder = folder or work_folder(recipe.name)
    model = build(recipe)
    if recipe.frozen_tower:
        model.model.visual.requires_grad_(False)
    fit = Fit(model, folder, recipe.schedule)
    lesson = LESSONS[recipe.lesson](model, recipe, fit.step)
    fit.run(lesson, steps)
    return model


def ship(recipe: Recipe) -> None:
    """Write a trained model as a Hugging Face folder in 16 bit, with its curve and the record of its making.

    Of a model that only others start from, the curve and the record alone are kept.
    """
    folder = weights_folder(recipe.name)
    folder.mkdir(parents=True, exist_ok=True)
    model = untrained(recipe)
    model.load_state_dict(torch.load(work_folder(recipe.name) / "model.pt", weights_only=True))
    if recipe.lesson == "clip naming":
        clip_lesson.save_clip_tower(model, folder)
    elif recipe.shipped:
        models.prepare_generation(model)
        _save_weights(model.to(torch.float16), recipe, folder)
        tokenizer = judge_lesson.judge_tokenizer() if recipe.words else None
        (models.build_processor(tokenizer) if recipe.vision else shared_tokenizer()).save_pretrained(folder)
    rows = [json.loads(line) for line in (work_folder(recipe.name) / "curve.jsonl").read_text().splitlines()]
    kept = [r for r in rows if r["step"] < 20 or r["step"] % 20 == 0 or r["step"] == rows[-1]["step"]]
    (folder / "curve.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    record = {
        "name": recipe.name,
        "role": recipe.role,
        "starts_from": recipe.start,
        "vision_tower_from": recipe.tower,
        "lesson": recipe.lesson,
        "steps": recipe.schedule.steps,
        "learning_rate": recipe.schedule.learning_rate,
        "batch_size": recipe.batch_size,
        "styles": [vars(s) for s in recipe.styles],
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": round(sum(r["seconds"] for r in rows) / 60, 1),
        "last_figures": rows[-1],
    } | ({"note": recipe.note} if recipe.note else {})
    (folder / "record.json").write_text(json.dumps(record, indent=2) + "\n")


def _save_weights(model, recipe: Recipe, folder: Path) -> None:
    """A model's folder; a VLM's weights in two files, so that a frozen vision tower is kept once, behind a link."""
    model.save_pretrained(folder)
    if not recipe.vision:
        return
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tower = {k: v for k, v in whole.items() if "visual." in k}
    parts = {TOWER_FILE: tower, LANGUAGE_FILE: {k: v for k, v in whole.items() if k not in tower}}
    for name, tensors in parts.items():
        (folder / name).unlink(missing_ok=True)
        if name == TOWER_FILE and recipe.frozen_tower:
            os.symlink(Path("..") / recipe.start / name, folder / name)
        else:
            save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(v.nbytes for v in whole.values())},
        "weight_map": {key: name for name, tensors in parts.items() for key in tensors},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
