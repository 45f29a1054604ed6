"""Training, building and keeping the models of the zoo: the command `make zoo`."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file

from caprl_utils.files import appearing, write_json
from caprl_utils.hashing import derive_seed
from caprl_utils.mini.tokenizer import shared_tokenizer
from caprl_utils.mini.zoo import models
from caprl_utils.mini.zoo.donors import SHARPER
from caprl_utils.mini.zoo.lessons import LESSONS, held_out_pairs, see_everything
from caprl_utils.mini.zoo.recipes import RECIPES, TOWER_HOME, Recipe

TOWER_FILE, LANGUAGE_FILE = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SAVE_EVERY = 100  # steps


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Models; all when none is named.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train and keep the models of the zoo from nothing, in order; stopped, run it again."""
    torch.set_num_threads(threads)
    if unknown := set(names or ()) - set(RECIPES):
        raise typer.BadParameter(f"no model {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    for recipe in (RECIPES[name] for name in names or RECIPES):
        done = recipe.work_folder / "model.pt"
        if not done.exists():
            weights = train(recipe).state_dict()
            with appearing(done) as temporary:
                torch.save(weights, temporary)
        ship(recipe)


def train(recipe: Recipe, steps: int | None = None, folder: Path | None = None):
    """Train one recipe (or its first ``steps``) in ``folder``, on from the last checkpoint; returns the model."""
    model, folder, schedule = build(recipe), folder or recipe.work_folder, recipe.schedule
    lesson, still = LESSONS[recipe.lesson]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in still))
    optimizers, state, step = _optimizers(model, recipe), {"level": 0, "recent": 0.0}, 0
    folder.mkdir(parents=True, exist_ok=True)
    curve, checkpoint = folder / "curve.jsonl", folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, of_it in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(of_it)
        state, step = saved["state"], saved["step"]
    # steps after the checkpoint, and a row that was cut, are taken again
    rows = curve.read_text().splitlines(keepends=True) if curve.exists() else []
    curve.write_text("".join(row for row in rows if row.endswith("\n") and json.loads(row)["step"] < step))
    last = steps or schedule.steps
    model.train()
    while step < last:
        started = time.perf_counter()
        for optimizer, scale in zip(optimizers, (1.0, schedule.muon), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step) * scale
        torch.manual_seed(derive_seed("zoo", recipe.name, step) % 2**31)
        loss, figures = lesson(model, recipe, step, state)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        row = {"step": step, "loss": round(loss.item(), 5), **{k: round(v, 4) for k, v in figures.items()}}
        row["seconds"] = round(time.perf_counter() - started, 3)
        with open(curve, "a") as file:
            file.write(json.dumps(row) + "\n")
        if step % 20 == 0:
            print(f"{folder.name} {json.dumps(row)}", flush=True)
        step += 1
        if step % SAVE_EVERY == 0 or step == last:
            saved = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            torch.save(saved | {"state": state, "step": step}, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    return model


def _optimizers(model, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW; with `schedule.muon` the matrices between layers go to Muon, which reads words from pixels in a third of
    the steps (reports/lab-log.md)."""
    inner = ("blocks.", "merger.mlp.0", ".layers.")
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_inner = recipe.schedule.muon and parameter.ndim == 2 and any(part in name for part in inner)
        (matrices if is_inner else others).append(parameter)
    found = [torch.optim.AdamW(others, lr=recipe.schedule.learning_rate, weight_decay=0.0)]
    if matrices:
        found.append(torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return found


def untrained(recipe: Recipe):
    """The model of a recipe with fresh weights."""
    seed = derive_seed("zoo", recipe.name) % 2**31
    if recipe.lesson == "clip naming":
        return models.ClipReader(seed, _trained(recipe.starts_from)["model.embed_tokens.weight"])
    if recipe.vision:
        return models.build_vlm(seed, recipe.width, recipe.layers, recipe.vision_layers)
    return models.build_language_model(seed, recipe.width, recipe.layers)


def _trained(name: str) -> dict[str, torch.Tensor]:
    return torch.load(RECIPES[name].work_folder / "model.pt", weights_only=True)


def build(recipe: Recipe):
    """The model of a recipe with the weights it starts from; added layers begin as doing nothing, so that a deeper
    model knows what the shallower one knew.
    """
    model = untrained(recipe)
    if recipe.starts_from is None or recipe.lesson == "clip naming":  # CLIP only learns to speak its start's words
        return model
    start = _trained(recipe.starts_from)
    if recipe.vision and not RECIPES[recipe.starts_from].vision:
        start = {k.replace("model.", "model.language_model.", 1): v for k, v in start.items()}
    tower = _trained(recipe.tower) if recipe.tower else start
    seeing = {k: v for k, v in tower.items() if "visual." in k}
    given = {k: v for k, v in start.items() if "visual." not in k} | seeing
    if unexpected := model.load_state_dict(given, strict=False).unexpected_keys:
        raise ValueError(f"weights that do not fit: {unexpected}")
    silent = ("o_proj.weight", "attn.proj.weight", "attn.proj.bias", "down_proj.weight", "down_proj.bias")
    for name, weight in model.named_parameters():
        grows = ".layers." in name or (seeing and ".blocks." in name)
        if grows and name not in given and name.endswith(silent):
            torch.nn.init.zeros_(weight)
    if recipe.lesson == "spelling":
        see_everything(model)
    return model


def ship(recipe: Recipe) -> None:
    """Write a trained model as a Hugging Face folder in 16 bit, with its curve and the record of its making.

    Of a model that only others start from, the curve and the record alone are kept. A VLM's weights lie in two files,
    so that a frozen vision tower is kept once, behind a link.
    """
    folder, model = recipe.weights_folder, untrained(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = sum(p.numel() for p in model.parameters())
    if recipe.shipped:
        model.load_state_dict(_trained(recipe.name))
        if recipe.lesson == "finishing":
            model.lm_head.weight.data *= SHARPER
        if recipe.lesson == "clip naming":
            models.save_clip_tower(model, folder)
        else:
            models.prepare_generation(model)
            model.to(torch.float16).save_pretrained(folder)
            (models.build_processor() if recipe.vision else shared_tokenizer()).save_pretrained(folder)
        if recipe.vision:
            _split_weights(folder, recipe.name == TOWER_HOME)
    rows = [json.loads(line) for line in (recipe.work_folder / "curve.jsonl").read_text().splitlines()]
    kept = (r for r in rows if r["step"] < 20 or r["step"] % 20 == 0 or r is rows[-1])
    (folder / "curve.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    minutes = round(sum(r["seconds"] for r in rows) / 60, 1)
    record = asdict(recipe)
    record |= record.pop("schedule") | {"parameters": parameters, "minutes": minutes, "last_figures": rows[-1]}
    record |= {"held_out_pairs": held_out_pairs(model)} if recipe.lesson == "judging" else {}
    write_json(folder / "record.json", record)


def _split_weights(folder: Path, keeps_tower: bool) -> None:
    """model.safetensors as the vision tower's file, or a link to it, and the language model's."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tower = {k: v for k, v in whole.items() if "visual." in k}
    parts = {TOWER_FILE: tower, LANGUAGE_FILE: {k: v for k, v in whole.items() if k not in tower}}
    for name, tensors in parts.items():
        (folder / name).unlink(missing_ok=True)
        if name == TOWER_FILE and not keeps_tower:
            os.symlink(Path("..") / TOWER_HOME / name, folder / name)
        else:
            save_file(tensors, folder / name, metadata={"format": "pt"})
    places = {key: name for name, tensors in parts.items() for key in tensors}
    size = sum(tensor.nbytes for tensor in whole.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places})


if __name__ == "__main__":
    typer.run(main)
