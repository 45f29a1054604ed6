"""Is the assembled model what it should be? Asked of the files that were written, against the donors again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from caprl_utils.errors import UserError
from caprl_utils.paths import shown
from caprl_utils.schema import Assembly
from caprl_utils.vlm_init.assembly import plan_of
from caprl_utils.vlm_init.checkpoint import Checkpoint
from caprl_utils.vlm_init.plan import Plan
from caprl_utils.vlm_init.summary import Summary

if TYPE_CHECKING:
    import torch


def verify_tensors(summary: Summary) -> dict[str, int]:
    """Compare every stored tensor with its donor's, one at a time, at any size; returns part -> tensors compared.

    Raises UserError naming the first that differs, which a disk or a later change of the folder must have done.
    """
    import torch

    plan = plan_of(Assembly.model_validate(summary.setting))
    stored = Checkpoint(summary.folder)
    dtype = getattr(torch, summary.dtype)
    compared: dict[str, int] = {}
    for take in sorted(plan.takes, key=lambda t: stored.tensors[t.target].file):
        if take.source is None:
            continue
        wanted = plan.donors[take.part].read(take.source)
        wanted = (wanted if take.pick is None else take.pick(wanted)).to(dtype)
        if not torch.equal(stored.read(take.target), wanted):
            raise UserError(
                f"{take.target} in {shown(summary.folder)} differs from its donor; assemble it again"
            )
        compared[take.part] = compared.get(take.part, 0) + 1
    return compared


def text_differences(
    summary: Summary, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> dict[str, float]:
    """Largest difference of logits between the new model and its language donor, in float32, both in memory.

    input_ids, attention_mask: (B, T). Returned without padding, and at the tokens that count with it.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    plan = plan_of(Assembly.model_validate(summary.setting))
    donor = donor_language_model(plan)
    model = AutoModelForImageTextToText.from_pretrained(summary.folder, dtype=torch.float32).eval()
    masks = {"without padding": torch.ones_like(attention_mask), "with padding": attention_mask}
    found = {}
    for name, mask in masks.items():
        with torch.no_grad():
            ours = model(input_ids=input_ids, attention_mask=mask).logits
            theirs = donor(input_ids=input_ids, attention_mask=mask).logits
        found[name] = (ours - theirs)[mask.bool()].abs().max().item()
    return found


def donor_language_model(plan: Plan) -> Any:
    """The language donor as a text-only model in float32, of the class its weights are for."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = plan.donors["language model"].folder
    if plan.config.model_type == "qwen2_5_vl":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = AutoConfig.for_model(**plan.config.text_config.to_dict())
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {}
    for take in plan.takes:
        if take.part == "language model":
            tensor = plan.donors[take.part].read(take.source)
            name = take.target.removeprefix("language_model.")
            weights[name] = (tensor if take.pick is None else take.pick(tensor)).float()
    if plan.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model.eval()
