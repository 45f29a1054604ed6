"""Donors: their folders, configs, weights and tokenizers, and what can be wrong with a download."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.paths import shown
from caprl_utils.registry import made_model
from caprl_utils.schema import Donor

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    Tensors = Mapping[str, torch.Tensor]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NO_WEIGHTS = (
    "has no safetensors. An interrupted download goes on when started again. Pickled weights (pytorch_model*.bin) are "
    "not opened here: if you trust them, save them once with transformers (AutoModel and AutoProcessor: "
    "`X.from_pretrained(SOURCE).save_pretrained(FOLDER)`), or name a `revision` that has safetensors (often refs/pr/N)"
)


def require(condition: Any, message: str) -> None:
    """Raise UserError with `message` unless the condition holds."""
    if not condition:
        raise UserError(message)


def donor_folder(donor: Donor) -> Path:
    """A donor's folder on this machine, fetched from the hub if need be. Raises UserError when it cannot be had."""
    if (made := made_model(donor.path)) is not None:
        return made
    if donor.path.startswith(paths.ZOO_PREFIX) or Path(donor.path).is_dir():
        return Path(paths.resolve_model(donor.path))
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(donor.path, revision=donor.revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # also the hub's own
        raise UserError(
            f"donor {donor.path!r} is no folder here and could not be fetched from the hub: "
            f"{str(error).splitlines()[0]}. Check the name and the network (HF_HUB_OFFLINE must not be set), or name "
            "a folder"
        ) from None


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON file of a donor, as it is. Raises UserError when it is missing or cut."""
    file = folder / name
    require(file.is_file(), f"{shown(folder)} has no {name}; is it a model folder?")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{shown(file)} cannot be read ({error}); fetch the model again") from None


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """A model's tensors by name, mapped from disk. Raises UserError for a missing, cut or foreign file, naming it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors, sharded = {}, (folder / INDEX).is_file()
    require(sharded or (folder / SINGLE).is_file(), f"{shown(folder)} {NO_WEIGHTS}")
    names = read_config(folder, INDEX)["weight_map"].values() if sharded else [SINGLE]
    for file in sorted({folder / name for name in names}):
        require(file.is_file(), f"missing shard {shown(file)}, which {INDEX} names; fetch the model again")
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise UserError(
                f"{shown(file)} ({file.stat().st_size} bytes) is cut, damaged or a git-lfs pointer ({error}); fetch "
                "the model again (`git lfs pull` in a clone)"
            ) from None
    return tensors


# Each changes what a language model computes; a default of a class counts as a value.
LANGUAGE_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "rms_norm_eps", "rope_theta", "rope_type", "vocab_size", "tie_word_embeddings",
    "sliding_window",
)  # fmt: skip


def language_facts(config: Any) -> dict[str, Any]:
    """The values of LANGUAGE_KEYS in a text config of transformers."""
    facts = {key: getattr(config, key, None) for key in LANGUAGE_KEYS}
    facts["head_dim"] = facts["head_dim"] or config.hidden_size // config.num_attention_heads
    facts |= {key: config.rope_parameters[key] for key in ("rope_theta", "rope_type")}
    if not getattr(config, "use_sliding_window", False):
        facts["sliding_window"] = None  # a window that is not used does not count
    return facts


def fast_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer as its files say. AutoTokenizer would swap the pre-tokenizer of a Qwen2 it does not know."""
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    from sentencepiece import sentencepiece_model_pb2

    file = folder / "tokenizer.model"  # InternLM2: sentencepiece, and a class of its own that we do not run
    require(file.is_file(), f"{shown(folder)} has neither tokenizer.json nor tokenizer.model; fetch the model again")
    pieces = sentencepiece_model_pb2.ModelProto()
    pieces.ParseFromString(file.read_bytes())
    space_first = pieces.normalizer_spec.add_dummy_prefix  # LlamaTokenizer would always put one
    return LlamaTokenizer.from_pretrained(folder, add_prefix_space=space_first)


def renamed(tokenizer: PreTrainedTokenizerFast, names: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """Reserved tokens under new names (or with these already), as special tokens with the ids they had, and no start
    token by itself: the chat template writes it. Raises UserError for a token that has neither name.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state, numbers = json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.get_vocab()
    vocabulary = state["model"]["vocab"]
    for old, new in names.items():
        number = numbers.get(new, numbers.get(old))
        require(number is not None, f"rename_tokens: the tokenizer has neither {old!r} nor {new!r}")
        if old in vocabulary:
            vocabulary[new] = vocabulary.pop(old)
        state["added_tokens"] = [t for t in state["added_tokens"] if t["id"] != number]
        state["added_tokens"].append({
            "id": number, "content": new, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        })  # fmt: skip
    state["post_processor"] = None
    state["added_tokens"].sort(key=lambda t: t["id"])
    marks = ("bos_token", "eos_token", "unk_token", "pad_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=tokenizer.model_max_length,
        **{key: names.get(mark, mark) for key in marks if (mark := getattr(tokenizer, key)) is not None},
    )  # fmt: skip
