"""Tokenizers of donors: read without code from outside, compared, given names for reserved tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils.errors import UserError
from caprl_utils.paths import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def fast_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer as its files say. AutoTokenizer would swap the pre-tokenizer of a Qwen2 it does not know."""
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if (
        folder / "tokenizer.model"
    ).is_file():  # InternLM2: sentencepiece, and a class of its own we do not run
        return LlamaTokenizer.from_pretrained(
            folder, add_prefix_space=_adds_a_space(folder / "tokenizer.model")
        )
    raise UserError(f"{shown(folder)} has neither tokenizer.json nor tokenizer.model; fetch the model again")


def _adds_a_space(file: Path) -> bool:
    """Whether a sentencepiece model puts a space before a text; LlamaTokenizer always would."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(file.read_bytes())
    return model.normalizer_spec.add_dummy_prefix


def same_ids(left: Any, right: Any, left_name: str, right_name: str) -> None:
    """Raise UserError unless every token of both tokenizers has the same id in both, and `right` adds none."""
    ours, theirs = left.get_vocab(), right.get_vocab()
    if moved := [t for t, i in theirs.items() if ours.get(t, i) != i]:
        token = min(moved)
        raise UserError(
            f"the tokenizers of {left_name} and {right_name} do not fit together: {len(moved)} tokens have "
            f"other ids, {token!r} for one ({ours[token]} and {theirs[token]})"
        )
    if added := sorted(set(theirs) - set(ours)):
        raise UserError(
            f"{right_name} has {len(added)} tokens that {left_name} lacks ({', '.join(map(repr, added[:5]))}); "
            "the language model would have no embedding for them"
        )


def renamed(tokenizer: PreTrainedTokenizerFast, names: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """Reserved tokens under new names, as special tokens with the ids they had; no start token is added by itself.

    The chat template writes the start token, and a prompt should not have two.
    A token that has its new name already is left as it is. Raises UserError for one that has neither.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for old, new in names.items():
        number = tokenizer.get_vocab().get(new, tokenizer.get_vocab().get(old))
        if number is None:
            raise UserError(f"rename_tokens: the tokenizer has neither {old!r} nor {new!r}")
        if old in vocabulary:
            vocabulary[new] = vocabulary.pop(old)
        state["added_tokens"] = [t for t in state["added_tokens"] if t["id"] != number]
        state["added_tokens"].append({
            "id": number, "content": new, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        })  # fmt: skip
    state["post_processor"] = None
    state["added_tokens"].sort(key=lambda t: t["id"])
    special = {
        key: names.get(value, value)
        for key in ("bos_token", "eos_token", "unk_token", "pad_token")
        if isinstance(value := getattr(tokenizer, key), str)
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=tokenizer.model_max_length,
        **special,
    )


def end_ids(tokenizer: Any, tokens: list[str]) -> list[int]:
    """Ids of the end tokens that the tokenizer has, in the order given. Raises UserError when it has none."""
    vocabulary = tokenizer.get_vocab()
    if not (found := [vocabulary[t] for t in tokens if t in vocabulary]):
        raise UserError(f"end_tokens: the tokenizer has none of {', '.join(tokens)}")
    return found
