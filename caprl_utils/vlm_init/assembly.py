"""Put a vision-language model together: check everything, stream the weights, say what was done."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils import provenance
from caprl_utils.config import load_assembly
from caprl_utils.errors import UserError
from caprl_utils.files import write_json
from caprl_utils.hashing import value_hash
from caprl_utils.paths import shown
from caprl_utils.runs import Lock
from caprl_utils.schema import Assembly
from caprl_utils.vlm_init.plan import PARTS, Plan
from caprl_utils.vlm_init.summary import FILE, PartSummary, Summary

if TYPE_CHECKING:
    import torch

FORMAT = 1  # of the files written; part of the key
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def assemble(setting: str | Assembly, out: Path | str, seed: int | None = None) -> Summary:
    """Assemble a model into the folder `out` and return its summary.

    setting: a name of configs/vlm_init, a YAML file, or the settings themselves. seed: of the projector; the
    setting's own by default. A folder that holds this very model already is left as it is; an assembly that was
    stopped starts again, and `out` appears only when it is complete. One process at a time writes it; others wait.
    Raises UserError, before anything is copied, for donors that do not fit, missing or cut files, and a folder
    that holds something else.
    """
    setting = setting if isinstance(setting, Assembly) else load_assembly(setting)
    if seed is not None:
        projector = setting.projector.model_copy(update={"seed": seed})
        setting = setting.model_copy(update={"projector": projector})
    plan = plan_of(setting)
    out = Path(out).absolute()
    hashes = {part: donor.content_hash() for part, donor in plan.donors.items()}
    key = value_hash({"setting": setting, "donors": hashes, "format": FORMAT})
    if done := _done(out, key):
        return done
    lock = Lock(out.with_name(f".{out.name}.lock"), shown(out))
    lock.acquire()
    try:
        return _done(out, key) or _assemble(setting, plan, out, key, hashes)
    finally:
        lock.release()


def _done(out: Path, key: str) -> Summary | None:
    """The summary of a folder that holds this very model, else None."""
    return done if (out / FILE).is_file() and (done := Summary.load(out)).key == key else None


def _assemble(setting: Assembly, plan: Plan, out: Path, key: str, hashes: dict[str, str]) -> Summary:
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
        summary = _write(setting, plan, partial, key, hashes)
    except UserError:
        shutil.rmtree(partial)
        raise
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return summary.model_copy(update={"folder": out})


def plan_of(setting: Assembly) -> Plan:
    """Open and check the donors of a setting; nothing is written. Raises UserError for what does not fit."""
    from caprl_utils.vlm_init import llava, qwen

    plan = {"qwen2_5_vl": qwen, "llava": llava}[setting.architecture].make_plan(setting)
    plan.check()
    return plan


def _write(setting: Assembly, plan: Plan, folder: Path, key: str, hashes: dict[str, str]) -> Summary:
    from caprl_utils.vlm_init.writer import stored_bytes, write_weights

    dtype = _dtype(setting, plan)
    images = plan.save_processor(folder)
    plan.config.dtype = dtype
    plan.config.architectures = [_class_name(setting)]
    plan.config.save_pretrained(folder)
    ends = _save_generation_config(setting, plan, folder)
    check = write_weights(plan, folder, dtype, setting.projector, setting.max_shard_bytes)
    found = provenance.versions()
    summary = Summary(
        key=key,
        setting=setting.model_dump(mode="json"),
        architecture=_class_name(setting),
        dtype=str(dtype).removeprefix("torch."),
        parts=_parts(setting, plan),
        parameters=sum(plan.parameters().values()),
        bytes_on_disk=stored_bytes(folder),
        tied_head=plan.config.tie_word_embeddings,
        projector_checksum=check,
        donor_hashes=hashes,
        agreed=plan.agreed,
        images=images,
        end_token_ids=ends,
        left_out=plan.left_out,
        notes=plan.notes,
        versions={name: found[name] for name in ("torch", "transformers") if name in found},
        folder=folder,
    )
    write_json(folder / FILE, summary.model_dump(mode="json", exclude={"folder"}) | {"folder": "."})
    return summary


def _class_name(setting: Assembly) -> str:
    return {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "llava": "LlavaForConditionalGeneration"}[
        setting.architecture
    ]


def _dtype(setting: Assembly, plan: Plan) -> torch.dtype:
    """The setting's, or the commonest of the language model's tensors."""
    import torch

    if setting.dtype != "auto":
        return getattr(torch, setting.dtype)
    stored = Counter(t.dtype for t in plan.donors["language model"].tensors.values()).most_common(1)[0][0]
    if stored not in DTYPES:
        raise UserError(f"weights of type {stored} in {plan.donors['language model'].folder}; set dtype")
    return getattr(torch, DTYPES[stored])


def _save_generation_config(setting: Assembly, plan: Plan, folder: Path) -> list[int]:
    """Ends of turn for chat and base donors alike, padding, greedy unless asked otherwise."""
    from transformers import GenerationConfig

    from caprl_utils.vlm_init.tokens import end_ids, fast_tokenizer

    tokenizer = fast_tokenizer(folder)
    ends = end_ids(tokenizer, setting.end_tokens)
    text: Any = plan.config.text_config
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[-1]
    GenerationConfig(eos_token_id=ends, pad_token_id=pad, bos_token_id=text.bos_token_id).save_pretrained(
        folder
    )
    return ends


def _parts(setting: Assembly, plan: Plan) -> dict[str, PartSummary]:
    how = setting.projector
    drawn = f"normal(0, {how.std})" if how.initialisation == "normal" else "nn.Linear's own draw"
    sources = {
        "language model": setting.language.path,
        "vision tower": setting.vision.path,
        "projector": f"{drawn}, seed {how.seed}",
    }
    counts, sizes = Counter(t.part for t in plan.takes), plan.parameters()
    return {
        part: PartSummary(source=sources[part], tensors=counts[part], parameters=sizes[part])
        for part in PARTS
    }
