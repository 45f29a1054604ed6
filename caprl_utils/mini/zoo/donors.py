"""Donors of the mini world for assembled models: the zoo's own, and language models rewritten from it.

Qwen2.5's part is played by the language half of a zoo captioner, without its patch merger. One that has met nothing but
text would be nearer to the paper; whether tables of this size could teach it to read visual tokens was not tried.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from caprl_utils import paths
from caprl_utils.files import write_json
from caprl_utils.models.base import model_hash
from caprl_utils.vlm_init.donors import INTERNLM_NAMES, read_config, read_weights

if TYPE_CHECKING:
    import torch

SHARPER = 2.0
"""Ours: the output layer of a finished captioner is scaled by this, so that temperature 1 is 0.5 of its training: as it
was, 6.4 % of what the strong one said was false, of its likeliest captions 3.8 %. Post-trained models are as sure."""


def folder(name: str) -> Path:
    """The folder of a zoo model that gives weights; made on the first call for those that are not shipped.

    Raises UserError for a model that the zoo lacks.
    """
    if name not in REWRITTEN:
        return Path(paths.resolve_model(name))
    source_name, write = REWRITTEN[name]
    source = folder(source_name)
    target = paths.RUNS / "zoo" / f"{name.removeprefix(paths.ZOO_PREFIX)}-{model_hash(source)}"
    if not target.is_dir():
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        write(source, partial)
        try:
            partial.rename(target)
        except OSError:  # another process was first
            shutil.rmtree(partial)
    return target


def _write(source: Path, target: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A model's folder but for its config: weights, tokenizer, generation defaults."""
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for file in source.iterdir():
        if "token" in file.name or file.name in ("chat_template.jinja", "generation_config.json"):
            shutil.copyfile(file, target / file.name)


def write_language_half(source: Path, target: Path) -> None:
    """The language model of a small captioner as a Qwen2 of its own: the same weights, as sharp as before its end; a
    projector learns little below a model that is sure of what it does not see yet (reports/lab-log.md).
    """
    from transformers import Qwen2Config

    given = read_config(source)["text_config"]
    rope = {key: value for key, value in given.pop("rope_parameters").items() if key != "mrope_section"}
    del given["model_type"]
    config = Qwen2Config(**given | {"dtype": "float16", "architectures": ["Qwen2ForCausalLM"]}, rope_parameters=rope)
    tensors = {name: tensor for name, tensor in read_weights(source).items() if not name.startswith("visual.")}
    _write(source, target, tensors | {"lm_head.weight": tensors["lm_head.weight"] / SHARPER})
    config.save_pretrained(target)


_SAME = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
         "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")  # fmt: skip


def write_internlm2(source: Path, target: Path) -> None:
    """A Qwen2 or Llama model in the layout of InternLM2: the same function, fused wqkv (see
    `vlm_init.donors.llama_tensors`), other names.

    Qwen2 has biases on q, k and v alone, InternLM2's flag has one on the output too: it is zero there.
    """
    import torch

    given, tensors = read_config(source), read_weights(source)
    bias = "model.layers.0.self_attn.q_proj.bias" in tensors
    heads, head_dim = given["num_key_value_heads"], given["hidden_size"] // given["num_attention_heads"]
    theirs = {new: old for old, new in INTERNLM_NAMES.items()}
    top = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if ".layers." not in name}
    out = {f"{theirs.get(module, module)}.weight": tensor for module, tensor in top.items()}
    for layer in range(given["num_hidden_layers"]):
        stem = f"model.layers.{layer}."
        for kind in ("weight", "bias") if bias else ("weight",):
            parts = [tensors[f"{stem}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            fused = torch.cat([part.unflatten(0, (heads, -1, head_dim)) for part in parts], dim=1).flatten(0, 2)
            out[f"{stem}attention.wqkv.{kind}"] = fused.contiguous()
        for old, new in list(INTERNLM_NAMES.items())[2:]:  # without embeddings and head
            out[f"{stem}{old}.weight"] = tensors[f"{stem}{new}.weight"]
        if bias:
            zeros = torch.zeros_like(tensors[f"{stem}input_layernorm.weight"])
            out[f"{stem}attention.wo.bias"] = tensors.get(f"{stem}self_attn.o_proj.bias", zeros)
    _write(source, target, out)
    write_json(target / "config.json", {key: given[key] for key in _SAME if key in given} | {
        "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": bias,
        "rope_theta": given["rope_parameters"]["rope_theta"], "rope_scaling": {"type": "dynamic", "factor": 2.0},
    })  # fmt: skip


REWRITTEN = {
    "zoo:language-base": ("zoo:base", write_language_half),
    "zoo:language-mid": ("zoo:mid", write_language_half),
    "zoo:language-internlm": ("zoo:language-base", write_internlm2),
}
"""Donor -> (what it is made from, how)."""
