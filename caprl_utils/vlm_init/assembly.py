"""Put a vision-language model together: check everything, save it with transformers, say what was done."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils import paths
from caprl_utils.config import load_assembly
from caprl_utils.files import full_disk_as_user_error, write_json
from caprl_utils.hashing import derive_seed, value_hash
from caprl_utils.models.base import PARTS, model_hash, part_of
from caprl_utils.paths import shown
from caprl_utils.runs import Lock, versions
from caprl_utils.schema import Assembly
from caprl_utils.vlm_init import donors

if TYPE_CHECKING:
    import torch

FILE = "assembly.json"  # the record of an assembly, in the model folder
FORMAT = 3  # of the files written; part of the key
MAX_SHARD = "2GB"
STD = 0.02  # of the projector; ours: initializer_range of both model classes. The paper says random, and no more


@dataclass(frozen=True)
class Plan:
    """All that an assembly writes but the projector. shapes: stored name -> shape of every tensor of the new model.
    tensors: stored name -> the donors' value, mapped from disk. folders: of language model and vision tower.
    """

    setting: Assembly
    config: Any
    shapes: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, torch.Tensor]
    folders: tuple[Path, Path]
    processor: Any
    max_image_tokens: int
    end_token_ids: list[int]
    notes: list[str]


def plan_of(setting: Assembly) -> Plan:
    """Open and check the donors of a setting; nothing is written. Raises UserError for what does not fit."""
    kind = donors.ARCHITECTURES[setting.architecture]
    language, vision = folders = tuple(map(donors.donor_folder, (setting.language, setting.vision)))
    config, notes = kind.config(setting, *map(donors.read_config, folders))
    processor, max_image_tokens = kind.processor(setting, config, *folders)
    ids = processor.tokenizer.get_vocab()
    ends = [ids[token] for token in setting.end_tokens if token in ids]
    donors.require(ends, f"end_tokens: the tokenizer has none of {', '.join(setting.end_tokens)}")
    shapes = stored_shapes(config)
    found = donors.donor_tensors(config, *map(donors.read_weights, folders))
    tensors = {name: found.get(name) for name in shapes if part_of(name) != "projector"}
    for name, tensor in tensors.items():
        place = shown(vision if part_of(name) == "vision_tower" else language)
        has = "no tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
        donors.require(has == f"shape {shapes[name]}", f"{place} has {has} for {name}, the new model needs "
                       f"{shapes[name]}; does its config.json belong to these weights?")  # fmt: skip
    return Plan(setting, config, shapes, tensors, folders, processor, max_image_tokens, ends, notes)


def stored_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name in the checkpoint -> shape of every tensor of the config's class, built on the meta device."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    stored, shapes = donors.ARCHITECTURES[config.model_type].stored, {}
    for name, parameter in model.named_parameters():  # tied ones stand once
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            old = next((start for start in stored if name.startswith(start)), "")
            shapes[stored.get(old, "") + name.removeprefix(old)] = tuple(parameter.shape)
    return shapes


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Number of parameters of each part."""
    return {part: sum(prod(s) for name, s in shapes.items() if part_of(name) == part) for part in PARTS}


def full_size_config(setting: Assembly) -> Any:
    """The config that an assembly of the paper's donors would write, checked as a real one, from what the hub shows of
    theirs (excerpts of config.json in configs/vlm_init/public). Raises UserError.
    """
    names = (donor.path.rpartition("/")[2].lower() for donor in (setting.language, setting.vision))
    raw = (json.loads((paths.CONFIGS / "vlm_init" / "public" / f"{name}.json").read_text()) for name in names)
    return donors.ARCHITECTURES[setting.architecture].config(setting, *raw)[0]


def assemble(setting: str | Assembly, out: Path, seed: int = 0) -> dict[str, Any]:
    """Assemble a model into the folder `out`; returns the record, as the folder's assembly.json has it. setting: a name
    of configs/vlm_init, a YAML file, or the settings. A folder with this very model is left as it is; `out` appears
    only when complete; one process writes it, others wait. Raises UserError, before anything is written, for donors
    that do not fit or are damaged, and a folder with something else.
    """
    plan = plan_of(setting if isinstance(setting, Assembly) else load_assembly(setting))
    out, hashes = out.absolute(), [model_hash(folder) for folder in plan.folders]
    key = value_hash({"setting": plan.setting, "seed": seed, "donors": hashes, "format": FORMAT})
    partial = out.with_name(f".{out.name}.partial")
    with Lock(out.with_name(f".{out.name}.lock"), shown(out)):
        if (out / FILE).is_file() and (made := donors.read_config(out, FILE))["key"] == key:
            return made
        free = not out.exists() or not any(out.iterdir())
        donors.require(free, f"{shown(out)} is not empty and holds something else (another setting, seed or donor); "
                       "remove it or name another folder")  # fmt: skip
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            record = {"key": key, **_save(plan, partial, seed), "donor_hashes": hashes}
            write_json(partial / FILE, record)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # what an error leaves
        return record


def _save(plan: Plan, folder: Path, seed: int) -> dict[str, Any]:
    """Write weights, config, generation config (greedy, all ends of turn) and processor; returns what they are."""
    import torch
    import transformers
    from safetensors.torch import save

    setting, made_as = plan.setting, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(plan.config)]
    language = Counter(tensor.dtype for name, tensor in plan.tensors.items() if part_of(name) == "language_model")
    ((commonest, _),) = language.most_common(1)
    dtype = commonest if setting.dtype == "auto" else getattr(torch, setting.dtype)
    fresh = {name: tensor.to(dtype) for name, tensor in fresh_projector(plan.shapes, seed).items()}
    model, report = made_as.from_pretrained(
        None, config=plan.config, state_dict={**plan.tensors, **fresh}, dtype=dtype, output_loading_info=True
    )
    assert not any(report.values()), report  # transformers would draw what is missing
    pad = plan.processor.tokenizer.pad_token_id
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=plan.end_token_ids, pad_token_id=plan.end_token_ids[-1] if pad is None else pad,
        bos_token_id=plan.config.text_config.bos_token_id,
    )  # fmt: skip
    with full_disk_as_user_error(folder):
        model.save_pretrained(folder, max_shard_size=MAX_SHARD)
        plan.processor.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes 0600
    counts, sizes = Counter(map(part_of, plan.shapes)), parameters(plan.shapes)
    sources = {"vision_tower": setting.vision.path, "projector": f"normal(0, {STD}), seed {seed}",
               "language_model": setting.language.path}  # fmt: skip
    return {
        "setting": setting.model_dump(mode="json"), "seed": seed, "architecture": made_as.__name__,
        "dtype": str(dtype).removeprefix("torch."), "projector_checksum": hashlib.sha256(save(fresh)).hexdigest()[:16],
        "parts": {p: {"source": sources[p], "tensors": counts[p], "parameters": sizes[p]} for p in PARTS},
        "max_image_tokens": plan.max_image_tokens, "end_token_ids": plan.end_token_ids, "notes": plan.notes,
        "versions": {name: versions()[name] for name in ("torch", "transformers")},
    }  # fmt: skip


def fresh_projector(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """First values of the projector's tensors among `shapes`, float32: normal(0, STD), zero biases, norms at one. Each
    has a generator of its own, seeded by seed and name, so that their order changes nothing.
    """
    import torch

    drawn = {}
    for name in (name for name in shapes if part_of(name) == "projector"):
        if len(shapes[name]) == 1:
            drawn[name] = torch.full(shapes[name], 0.0 if name.endswith(".bias") else 1.0)
        else:
            generator = torch.Generator().manual_seed(derive_seed(seed, name))
            drawn[name] = torch.empty(shapes[name]).normal_(0, STD, generator=generator)
    return drawn


def _plan_behind(folder: Path) -> Plan:
    return plan_of(Assembly.model_validate(donors.read_config(folder, FILE)["setting"]))


def verify_tensors(folder: Path) -> dict[str, int]:
    """Compare an assembled model's tensors with its donors', one at a time, at any size; returns part -> how many.
    Raises UserError naming the first that differs, which a disk or a later change of the folder must have done.
    """
    import torch

    stored, compared = donors.read_weights(folder), Counter()
    for name, tensor in _plan_behind(folder).tensors.items():
        same = torch.equal(stored[name], tensor.to(stored[name].dtype))
        donors.require(same, f"{name} in {shown(folder)} differs from its donor; assemble it again")
        compared[part_of(name)] += 1
    return dict(compared)


def text_differences(folder: Path, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, float]:
    """Largest difference of logits between a new model and its language donor, in float32, both in memory: without
    padding, and at the tokens that count with it. input_ids, attention_mask: (B, T).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaForCausalLM

    plan = _plan_behind(folder)
    weights, config = donors.read_weights(plan.folders[0]), plan.config.text_config
    if "model.tok_embeddings.weight" in weights:  # InternLM2's own class is remote code
        state = donors.llama_tensors(weights, config)
        theirs = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    else:
        theirs = AutoModelForCausalLM.from_pretrained(plan.folders[0], dtype=torch.float32)
    ours = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    found, masks = {}, {"without padding": torch.ones_like(attention_mask), "with padding": attention_mask}
    for name, mask in masks.items():
        with torch.no_grad():
            left, right = (model(input_ids=input_ids, attention_mask=mask).logits for model in (ours, theirs))
        found[name] = (left - right)[mask.bool()].abs().max().item()
    return found
