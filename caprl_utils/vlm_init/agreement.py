"""What must agree before anything is copied. One table of comparisons, all differences told at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caprl_utils.errors import UserError

# Each changes what a language model computes; a default of a class counts as a value.
LANGUAGE_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "rms_norm_eps", "rope_theta", "rope_type", "vocab_size", "tie_word_embeddings",
    "sliding_window",
)  # fmt: skip


def language_facts(config: Any) -> dict[str, Any]:
    """The values of LANGUAGE_KEYS in a text config of transformers."""
    rope = config.rope_parameters
    facts = {key: getattr(config, key, None) for key in LANGUAGE_KEYS}
    facts["head_dim"] = facts["head_dim"] or config.hidden_size // config.num_attention_heads
    facts["rope_theta"], facts["rope_type"] = rope["rope_theta"], rope["rope_type"]
    if not getattr(config, "use_sliding_window", False):
        facts["sliding_window"] = None  # a window that is not used does not count
    return facts


def require_same(
    left: Mapping[str, Any],
    right: Mapping[str, Any],
    names: tuple[str, str],
    accepted: list[str],
    remedy: str,
) -> dict[str, tuple[Any, Any]]:
    """Compare two sets of facts; returns the accepted differences.

    Raises UserError listing every other difference, and for an accepted name that is no hyperparameter.
    """
    if unknown := sorted(set(accepted) - set(left)):
        raise UserError(
            f"accepted_differences: {', '.join(unknown)} is not compared; known: {', '.join(left)}"
        )
    differing = {key: (left[key], right[key]) for key in left if left[key] != right[key]}
    refused = {key: pair for key, pair in differing.items() if key not in accepted}
    if refused:
        told = "; ".join(f"{key} {a!r} and {b!r}" for key, (a, b) in refused.items())
        raise UserError(f"{names[0]} and {names[1]} do not fit together: {told}. {remedy}")
    return differing


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless the condition holds."""
    if not condition:
        raise UserError(message)
