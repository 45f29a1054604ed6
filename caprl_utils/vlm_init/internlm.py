"""InternLM2 and 2.5 weights as transformers' own Llama class: the same function without remote code.

What differs is layout only (modeling_internlm2.py of the model's repository, and InternLM's own
tools/convert2llama.py): the fused ``wqkv`` holds, for each key-value head in turn, the rows of its query heads, then
its key, then its value. Two points are ours:

- `bias: true` converts too (Llama's attention_bias covers q, k, v and o alike, as InternLM2's flag does).
- "dynamic" rope scaling is left out: it acts beyond max_position_embeddings (32,768, kept) only, farther than any text
  here, and transformers, LLaMA-Factory's transformers and vLLM each have their own reading of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from caprl_utils.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig

KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
LAYER_NAMES = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP_NAMES = {"model.embed_tokens.weight": "model.tok_embeddings.weight", "lm_head.weight": "output.weight"}


def llama_config(internlm: Mapping[str, Any]) -> LlamaConfig:
    """config.json of an InternLM2 model -> LlamaConfig. Raises UserError for a rope scaling that is not known."""
    from transformers import LlamaConfig

    if missing := [key for key in KEPT[:6] if key not in internlm]:
        raise UserError(f"the InternLM2 config lacks {', '.join(missing)}; is config.json whole?")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": internlm.get("rope_theta", 10_000)}
    scaling = internlm.get("rope_scaling")
    kind = scaling and (scaling.get("type") or scaling.get("rope_type"))
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": scaling["factor"]}
    elif kind not in (None, "dynamic"):
        raise UserError(f"rope scaling {kind!r} of the InternLM2 config is not known; dynamic and linear are")
    return LlamaConfig(
        **{key: internlm[key] for key in KEPT if key in internlm},
        attention_bias=bool(internlm.get("bias", False)),
        mlp_bias=False,
        tie_word_embeddings=bool(internlm.get("tie_word_embeddings", False)),
        rope_parameters=rope,
    )


def source_of(name: str, config: LlamaConfig) -> tuple[str, Callable[[torch.Tensor], torch.Tensor] | None]:
    """Llama tensor name -> (InternLM2 tensor name, how to take it out of the fused one)."""
    if name in TOP_NAMES:
        return TOP_NAMES[name], None
    stem, kind = name.rsplit(".", 1)
    for letter in "qkv":
        if stem.endswith(f"self_attn.{letter}_proj"):
            fused = stem.replace(f"self_attn.{letter}_proj", "attention.wqkv")
            return f"{fused}.{kind}", lambda tensor, letter=letter: split(tensor, config)["qkv".index(letter)]
    for new, old in LAYER_NAMES.items():
        if stem.endswith(new):
            return f"{stem.replace(new, old)}.{kind}", None
    return name, None


def split(wqkv: torch.Tensor, config: LlamaConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fused tensor ((heads + 2 kv heads) * head_dim, ...) -> query, key, value.

    Raises UserError when its rows do not fit the number of heads.
    """
    groups = config.num_attention_heads // config.num_key_value_heads
    rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    if wqkv.shape[0] != rows:
        raise UserError(
            f"a fused wqkv has {wqkv.shape[0]} rows, {config.num_attention_heads} heads and "
            f"{config.num_key_value_heads} key-value heads of {config.head_dim} make {rows}; wrong config.json?"
        )
    by_head = wqkv.unflatten(0, (config.num_key_value_heads, groups + 2, config.head_dim))
    return by_head[:, :groups].flatten(0, 2), by_head[:, -2].flatten(0, 1), by_head[:, -1].flatten(0, 1)


def fuse(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, config: Any) -> torch.Tensor:
    """The other way round, for small InternLM2 checkpoints of our own."""
    import torch

    heads, head_dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    parts = [part.unflatten(0, (heads, -1, head_dim)) for part in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 2)
