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

from pydantic import BaseModel, ConfigDict

from caprl_utils import provenance
from caprl_utils.config import load_assembly
from caprl_utils.errors import UserError
from caprl_utils.files import full_disk_as_user_error, write_json
from caprl_utils.hashing import derive_seed, value_hash
from caprl_utils.models.weights import PARTS, part_of
from caprl_utils.paths import shown
from caprl_utils.runs import Lock
from caprl_utils.schema import Assembly
from caprl_utils.vlm_init import donors, llava, qwen

if TYPE_CHECKING:
    import torch

FILE = "assembly.json"
FORMAT = 2  # of the files written; part of the key
MAX_SHARD = "2GB"
STD = 0.02  # of the projector; ours: initializer_range of both model classes. The paper says random, and no more
ARCHITECTURES = {"qwen2_5_vl": qwen, "llava": llava}


class Summary(BaseModel):
    """The record of one assembly; `assembly.json` of the model folder. parts: name -> source, tensors, parameters."""

    model_config = ConfigDict(frozen=True)

    key: str  # of setting, seed and donors: the same key, the same model
    setting: dict[str, Any]
    seed: int
    architecture: str
    dtype: str
    parts: dict[str, dict[str, Any]]
    tied_head: bool
    projector_checksum: str
    donor_hashes: list[str]
    max_image_tokens: int
    end_token_ids: list[int]
    notes: list[str]
    versions: dict[str, str]
    folder: Path

    @classmethod
    def load(cls, folder: Path) -> Summary:
        """Read it from a model folder. Raises UserError when there is none."""
        file = folder / FILE
        donors.require(file.is_file(), f"{shown(folder)} was not assembled here: it has no {FILE}")
        return cls.model_validate_json(file.read_text(encoding="utf-8")).model_copy(update={"folder": folder})


@dataclass(frozen=True)
class Plan:
    """All that an assembly writes but the projector. tensors: stored name -> the donors' value, mapped from disk.

    shapes: stored name -> shape of every tensor of the new model. donors: language model and vision tower.
    """

    setting: Assembly
    config: Any
    shapes: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, torch.Tensor]
    donors: tuple[donors.Weights, donors.Weights]
    processor: Any
    max_image_tokens: int
    end_token_ids: list[int]
    notes: list[str]


def plan_of(setting: Assembly) -> Plan:
    """Open and check the donors of a setting; nothing is written. Raises UserError for what does not fit."""
    kind, given = ARCHITECTURES[setting.architecture], (setting.language, setting.vision)
    folders = [donors.donor_folder(donor) for donor in given]
    config, notes = kind.combined(setting, *map(donors.read_config, folders))
    processor, max_image_tokens = kind.processor(setting, config, *folders)
    ends = donors.end_ids(processor.tokenizer, setting.end_tokens)
    language, vision = (donors.read_weights(*both) for both in zip(folders, kind.PREFIXES, strict=True))
    shapes = stored_shapes(config)
    found = kind.tensors(config, language.tensors, vision.tensors)
    tensors = {}
    for name, shape in shapes.items():
        if (part := part_of(name)) == "projector":
            continue
        place = shown((vision if part == "vision_tower" else language).folder)
        stored = tuple(found[name].shape) if name in found else None
        donors.require(stored == shape, f"{place} has {f'shape {stored}' if stored else 'no tensor'} for {name}, the "
                       f"new model needs {shape}; does its config.json belong to these weights?")  # fmt: skip
        tensors[name] = found[name]
    return Plan(
        setting, config, shapes, tensors, (language, vision), processor, max_image_tokens, ends, notes
    )


def stored_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name in the checkpoint -> shape of every tensor of the config's class, built on the meta device."""
    import torch
    from transformers import AutoModelForImageTextToText

    renamed = ARCHITECTURES[config.model_type].STORED
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    shapes = {}
    for name, parameter in model.named_parameters():  # tied ones stand once
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        old = next((prefix for prefix in renamed if name.startswith(prefix)), "")
        shapes[renamed.get(old, "") + name.removeprefix(old)] = tuple(parameter.shape)
    return shapes


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Number of parameters of each part."""
    return {part: sum(prod(s) for name, s in shapes.items() if part_of(name) == part) for part in PARTS}


def full_size_config(setting: Assembly) -> Any:
    """The config that an assembly of the paper's donors would write, from what the hub shows of theirs.

    The checks of hyperparameters are those of a real assembly. Raises UserError as these do.
    """
    raw = (donors.public_config(donor) for donor in (setting.language, setting.vision))
    return ARCHITECTURES[setting.architecture].combined(setting, *raw)[0]


def assemble(setting: str | Assembly, out: Path, seed: int = 0) -> Summary:
    """Assemble a model into the folder `out` and return its summary.

    setting: a name of configs/vlm_init, a YAML file, or the settings themselves. seed: of the projector. A folder
    that holds this very model already is left as it is; an assembly that was stopped starts again, and `out` appears
    only when it is complete. One process at a time writes it; others wait. Raises UserError, before anything is
    written, for donors that do not fit, missing or cut files, and a folder that holds something else.
    """
    plan = plan_of(setting if isinstance(setting, Assembly) else load_assembly(setting))
    out = out.absolute()
    hashes = [donor.content_hash() for donor in plan.donors]
    key = value_hash({"setting": plan.setting, "seed": seed, "donors": hashes, "format": FORMAT})
    if done := _done(out, key):
        return done
    lock = Lock(out.with_name(f".{out.name}.lock"), shown(out))
    lock.acquire()
    try:
        return _done(out, key) or _assemble(plan, out, key, hashes, seed)
    finally:
        lock.release()


def _done(out: Path, key: str) -> Summary | None:
    """The summary of a folder that holds this very model, else None."""
    file = out / FILE
    made = file.is_file() and json.loads(file.read_text(encoding="utf-8"))["key"] == key
    return Summary.load(out) if made else None


def _assemble(plan: Plan, out: Path, key: str, hashes: list[str], seed: int) -> Summary:
    """Write the model beside `out` and move it there when it is whole; the lock on `out` is ours."""
    if out.exists() and any(out.iterdir()):
        raise UserError(
            f"{shown(out)} is not empty and holds something else (another setting, seed or donor); "
            "remove it or name another folder"
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        dtype, checksum = _save(plan, partial, seed)
    except UserError:
        shutil.rmtree(partial)
        raise
    counts, sizes = Counter(map(part_of, plan.shapes)), parameters(plan.shapes)
    sources = {"vision_tower": plan.setting.vision.path, "projector": f"normal(0, {STD}), seed {seed}",
               "language_model": plan.setting.language.path}  # fmt: skip
    found = provenance.versions()
    summary = Summary(
        key=key, setting=plan.setting.model_dump(mode="json"), seed=seed, dtype=str(dtype).removeprefix("torch."),
        architecture=ARCHITECTURES[plan.setting.architecture].CLASS,
        parts={part: {"source": sources[part], "tensors": counts[part], "parameters": sizes[part]} for part in PARTS},
        tied_head=plan.config.tie_word_embeddings, projector_checksum=checksum, donor_hashes=hashes,
        max_image_tokens=plan.max_image_tokens, end_token_ids=plan.end_token_ids, notes=plan.notes,
        versions={name: found[name] for name in ("torch", "transformers") if name in found}, folder=out,
    )  # fmt: skip
    write_json(partial / FILE, summary.model_dump(mode="json") | {"folder": "."})
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return summary


def _save(plan: Plan, folder: Path, seed: int) -> tuple[torch.dtype, str]:
    """Write weights, config, generation config and processor; returns type of the weights and the projector's checksum.

    Ends of turn are those of chat and base donors alike; generation is greedy unless asked otherwise.
    """
    import transformers

    dtype = _dtype(plan)
    fresh = {name: tensor.to(dtype) for name, tensor in fresh_projector(plan.shapes, seed).items()}
    model, report = getattr(transformers, ARCHITECTURES[plan.setting.architecture].CLASS).from_pretrained(
        None, config=plan.config, state_dict={**plan.tensors, **fresh}, dtype=dtype, output_loading_info=True
    )
    assert not any(report.values()), report  # transformers would draw what is missing
    tokenizer = plan.processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else plan.end_token_ids[-1]
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=plan.end_token_ids, pad_token_id=pad, bos_token_id=plan.config.text_config.bos_token_id
    )
    with full_disk_as_user_error(folder):
        model.save_pretrained(folder, max_shard_size=MAX_SHARD)
        plan.processor.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes 0600
    return dtype, _checksum(fresh)


def _dtype(plan: Plan) -> torch.dtype:
    """The setting's, or the commonest of the language model's tensors."""
    import torch

    if plan.setting.dtype != "auto":
        return getattr(torch, plan.setting.dtype)
    language = plan.donors[0]
    stored = Counter(tensor.dtype for tensor in language.tensors.values()).most_common(1)[0][0]
    known = (torch.float32, torch.bfloat16, torch.float16)
    donors.require(stored in known, f"weights of type {stored} in {shown(language.folder)}; set dtype")
    return stored


def fresh_projector(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """First values of the projector's tensors among `shapes`, float32: normal(0, STD), zero biases, norms at one.

    Each is drawn by a generator of its own, seeded by seed and name, so that their order changes nothing.
    """
    import torch

    drawn = {}
    for name, shape in shapes.items():
        if part_of(name) != "projector":
            continue
        if name.endswith(".bias"):
            drawn[name] = torch.zeros(shape)
        elif len(shape) == 1:  # a norm
            drawn[name] = torch.ones(shape)
        else:
            generator = torch.Generator().manual_seed(derive_seed(seed, name))
            drawn[name] = torch.empty(shape).normal_(0, STD, generator=generator)
    return drawn


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """First 16 hex digits of the SHA-256 over names, shapes and values as stored, sorted by name."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def verify_tensors(summary: Summary) -> dict[str, int]:
    """Compare every stored tensor with its donor's, one at a time, at any size; returns part -> tensors compared.

    Raises UserError naming the first that differs, which a disk or a later change of the folder must have done.
    """
    import torch

    stored, compared = donors.read_weights(summary.folder), Counter()
    for name, tensor in plan_of(Assembly.model_validate(summary.setting)).tensors.items():
        same = torch.equal(stored.tensors[name], tensor.to(stored.tensors[name].dtype))
        donors.require(same, f"{name} in {shown(summary.folder)} differs from its donor; assemble it again")
        compared[part_of(name)] += 1
    return dict(compared)


def text_differences(
    summary: Summary, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> dict[str, float]:
    """Largest difference of logits between the new model and its language donor, in float32, both in memory.

    input_ids, attention_mask: (B, T). Returned without padding, and at the tokens that count with it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaForCausalLM

    plan = plan_of(Assembly.model_validate(summary.setting))
    donor, config = plan.donors[0], plan.config.text_config
    if "model.tok_embeddings.weight" in donor.tensors:  # InternLM2's own class is remote code
        state = llava.llama_tensors(donor.tensors, config)
        theirs = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    else:
        theirs = AutoModelForCausalLM.from_pretrained(donor.folder, dtype=torch.float32)
    ours = AutoModelForImageTextToText.from_pretrained(summary.folder, dtype=torch.float32)
    found = {}
    for name, mask in (
        ("without padding", torch.ones_like(attention_mask)),
        ("with padding", attention_mask),
    ):
        with torch.no_grad():
            both = [model(input_ids=input_ids, attention_mask=mask).logits for model in (ours, theirs)]
        found[name] = (both[0] - both[1])[mask.bool()].abs().max().item()
    return found
