"""Training, building and keeping the models of the zoo.

`make zoo` trains what is missing, in order, from nothing; stop it at any time and run it again.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from caprl_utils.hashing import derive_seed
from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.zoo import models
from caprl_utils.mini.zoo.lessons import LESSONS, Lesson, held_out_pairs
from caprl_utils.mini.zoo.recipes import RECIPES, TOWER_HOME, Recipe, Schedule

TOWER_FILE, LANGUAGE_FILE = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SAVE_EVERY = 100  # steps


class Fit:
    """Trains a model in a folder; run again after any stop, it goes on from its last checkpoint."""

    def __init__(self, model, folder: Path, schedule: Schedule) -> None:
        self.model, self.schedule = model, schedule
        self.optimizers = _optimizers(model, schedule)
        self.state, self.step = {"level": 0, "recent": 0.0}, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.curve, self.checkpoint = folder / "curve.jsonl", folder / "checkpoint.pt"
        rows = self.curve.read_text().splitlines(keepends=True) if self.curve.exists() else []
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, weights_only=True)
            self.model.load_state_dict(saved["model"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.state, self.step = saved["state"], saved["step"]
        # steps after the checkpoint, and a row that was cut, are taken again
        kept = (row for row in rows if row.endswith("\n") and json.loads(row)["step"] < self.step)
        self.curve.write_text("".join(kept))

    def _save(self) -> None:
        saved = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(saved | {"state": self.state, "step": self.step}, temporary)
        os.replace(temporary, self.checkpoint)

    def run(self, lesson: Lesson, last: int) -> None:
        """Take steps up to `last`."""
        self.model.train()
        while self.step < last:
            started = time.perf_counter()
            for optimizer, scale in zip(self.optimizers, (1.0, self.schedule.muon), strict=False):
                for group in optimizer.param_groups:
                    group["lr"] = self.schedule.rate(self.step) * scale
            loss, figures = lesson(self.step, self.state)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            row = {"step": self.step, "loss": round(loss.item(), 5), **{k: round(v, 4) for k, v in figures.items()}}
            row["seconds"] = round(time.perf_counter() - started, 3)
            with open(self.curve, "a") as file:
                file.write(json.dumps(row) + "\n")
            if self.step % 20 == 0:
                print(f"{self.curve.parent.name} {json.dumps(row)}", flush=True)
            self.step += 1
            if self.step % SAVE_EVERY == 0 or self.step == last:
                self._save()


def _optimizers(model, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """AdamW; with `schedule.muon` the matrices between layers go to Muon, which reads words from pixels in a third of
    the steps (reports/lab-log.md)."""
    inner = ("blocks.", "merger.mlp.0", ".layers.")
    named = dict(model.named_parameters())
    matrices = [p for n, p in named.items() if schedule.muon and p.ndim == 2 and any(part in n for part in inner)]
    others = [p for p in named.values() if not any(p is matrix for matrix in matrices)]
    found = [torch.optim.AdamW(others, lr=schedule.learning_rate, weight_decay=0.0)]
    if matrices:
        found.append(torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return found


def untrained(recipe: Recipe):
    """The model of a recipe with fresh weights."""
    seed = derive_seed("zoo", recipe.name) % 2**31
    if recipe.lesson == "clip naming":
        return models.ClipReader(seed, _trained(recipe.start)["model.embed_tokens.weight"])
    if recipe.vision:
        return models.build_vlm(seed, recipe.width, recipe.layers, recipe.vision_layers)
    return models.build_language_model(seed, recipe.width, recipe.layers)


def build(recipe: Recipe):
    """The model of a recipe with the weights it starts from."""
    model = untrained(recipe)
    if recipe.start is None or recipe.lesson == "clip naming":  # a CLIP tower only learns to speak its start's words
        return model
    start = _trained(recipe.start)
    if recipe.vision and not RECIPES[recipe.start].vision:
        start = {k.replace("model.", "model.language_model.", 1): v for k, v in start.items()}
    _take_over(model, {k: v for k, v in start.items() if "visual." not in k}, ".layers.")
    tower = _trained(recipe.tower) if recipe.tower else start
    _take_over(model, {k: v for k, v in tower.items() if "visual." in k}, ".blocks.")
    return model


def _take_over(model, weights: dict[str, torch.Tensor], layers: str) -> None:
    """Load weights; added layers begin as doing nothing, so that a deeper model knows what the shallower one knew."""
    if unexpected := model.load_state_dict(weights, strict=False).unexpected_keys:
        raise ValueError(f"weights that do not fit: {unexpected}")
    silent = ("o_proj.weight", "attn.proj.weight", "attn.proj.bias", "down_proj.weight", "down_proj.bias")
    for name, weight in model.named_parameters():
        if weights and layers in name and name not in weights and name.endswith(silent):
            torch.nn.init.zeros_(weight)


def _trained(name: str) -> dict[str, torch.Tensor]:
    return torch.load(RECIPES[name].work_folder / "model.pt", weights_only=True)


def train(recipe: Recipe, steps: int | None = None, folder: Path | None = None):
    """Train one recipe (or its first ``steps``) in ``folder``; returns the model."""
    model = build(recipe)
    if recipe.tower:
        model.model.visual.requires_grad_(False)
    fit = Fit(model, folder or recipe.work_folder, recipe.schedule)
    fit.run(LESSONS[recipe.lesson](model, recipe, fit.step), steps or recipe.schedule.steps)
    return model


def ship(recipe: Recipe) -> None:
    """Write a trained model as a Hugging Face folder in 16 bit, with its curve and the record of its making.

    Of a model that only others start from, the curve and the record alone are kept.
    """
    folder = recipe.weights_folder
    folder.mkdir(parents=True, exist_ok=True)
    model = untrained(recipe)
    if recipe.shipped:
        model.load_state_dict(_trained(recipe.name))
    pairs = {"held_out_pairs": held_out_pairs(model)} if recipe.lesson == "judging" else {}
    if recipe.lesson == "clip naming":
        models.save_clip_tower(model, folder)
    elif recipe.shipped:
        models.prepare_generation(model)
        _save_weights(model.to(torch.float16), recipe, folder)
        (models.build_processor() if recipe.vision else shared_tokenizer()).save_pretrained(folder)
    rows = [json.loads(line) for line in (recipe.work_folder / "curve.jsonl").read_text().splitlines()]
    kept = (r for r in rows if r["step"] < 20 or r["step"] % 20 == 0 or r is rows[-1])
    (folder / "curve.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    record = {
        "name": recipe.name, "role": recipe.role, "starts_from": recipe.start, "vision_tower_from": recipe.tower,
        "lesson": recipe.lesson, "steps": recipe.schedule.steps, "learning_rate": recipe.schedule.learning_rate,
        "batch_size": recipe.batch_size, "width": recipe.width, "layers": recipe.layers,
        "styles": [vars(s) for s in recipe.styles],
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": round(sum(r["seconds"] for r in rows) / 60, 1), "last_figures": rows[-1], **pairs,
    } | ({"note": recipe.note} if recipe.note else {})  # fmt: skip
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
        if name == TOWER_FILE and recipe.name != TOWER_HOME:
            os.symlink(Path("..") / TOWER_HOME / name, folder / name)
        else:
            save_file(tensors, folder / name, metadata={"format": "pt"})
    places = {key: name for name, tensors in parts.items() for key in tensors}
    index = {"metadata": {"total_size": sum(v.nbytes for v in whole.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
