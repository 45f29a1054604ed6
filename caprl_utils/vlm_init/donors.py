"""Donors: where they come from, their configs, weights and tokenizers.

Everything that can be wrong with a download is found here, before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.hashing import file_hash, value_hash
from caprl_utils.paths import shown
from caprl_utils.registry import made_model
from caprl_utils.schema import Donor

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NO_WEIGHTS = (
    "has no safetensors. An interrupted download goes on when started again. Pickled weights are not opened here: "
    "if you trust pytorch_model*.bin, save them once with transformers (AutoModel and AutoProcessor: "
    "`X.from_pretrained(SOURCE).save_pretrained(FOLDER)`) and name that folder, or name a `revision` that has "
    "safetensors (on the hub often refs/pr/NUMBER, under Community)"
)


def require(condition: bool, message: str) -> None:
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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(donor.path, revision=donor.revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"donor {donor.path!r} is no folder here and could not be fetched from the hub: "
            f"{str(error).splitlines()[0]}. Check the name and the network (HF_HUB_OFFLINE must not be set), or name "
            "a folder"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a donor, as it is. Raises UserError when it is missing or cut."""
    file = folder / "config.json"
    require(file.is_file(), f"{shown(folder)} has no config.json; is it a model folder?")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{shown(file)} cannot be read ({error}); fetch the model again") from None


def public_config(donor: Donor) -> dict[str, Any]:
    """What the hub shows of the config.json of a donor of the paper (excerpts in configs/vlm_init/public)."""
    return json.loads(
        (paths.CONFIGS / "vlm_init" / "public" / f"{donor.path.rpartition('/')[2].lower()}.json").read_text()
    )


@dataclass(frozen=True)
class Weights:
    """Tensors of a model folder by name, mapped from disk and not read before they are used."""

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, torch.Tensor]

    def content_hash(self) -> str:
        """Hash of the files that hold the tensors, and of config.json."""
        return value_hash({f.name: file_hash(f) for f in sorted({*self.files, self.folder / "config.json"})})


def read_weights(folder: Path, prefixes: tuple[str, ...] = ("",)) -> Weights:
    """Map a model's tensors with these prefixes. Raises UserError for a missing, cut or foreign file, naming it."""
    index, names = folder / INDEX, [SINGLE]
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise UserError(f"{shown(index)} cannot be read ({error}); fetch the model again") from None
    require(index.is_file() or (folder / SINGLE).is_file(), f"{shown(folder)} {NO_WEIGHTS}")
    files, tensors = tuple(folder / name for name in names), {}
    for file in files:
        tensors |= {name: tensor for name, tensor in _mapped(file).items() if name.startswith(prefixes)}
    return Weights(folder, files, tensors)


def _mapped(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    require(file.is_file(), f"missing shard {shown(file)}, which {INDEX} names; fetch the model again")
    try:
        with safe_open(file, "pt") as shard:
            return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(
            f"{shown(file)} ({file.stat().st_size} bytes) is cut, damaged or a git-lfs pointer ({error}); fetch the "
            "model again (`git lfs pull` in a clone)"
        ) from None


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
    file = folder / "tokenizer.model"  # InternLM2: sentencepiece, and a class of its own that we do not run
    require(
        file.is_file(),
        f"{shown(folder)} has neither tokenizer.json nor tokenizer.model; fetch the model again",
    )
    from sentencepiece import sentencepiece_model_pb2

    pieces = sentencepiece_model_pb2.ModelProto()
    pieces.ParseFromString(file.read_bytes())
    space_first = pieces.normalizer_spec.add_dummy_prefix  # LlamaTokenizer would always put one
    return LlamaTokenizer.from_pretrained(folder, add_prefix_space=space_first)


def renamed(tokenizer: PreTrainedTokenizerFast, names: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """Reserved tokens under new names, as special tokens with the ids they had; no start token is added by itself.

    The chat template writes the start token, and a prompt should not have two. A token that has its new name already
    is left as it is. Raises UserError for one that has neither.
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
    kept = {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=tokenizer.model_max_length,
        **{key: names.get(value, value) for key, value in kept.items() if isinstance(value, str)},
    )  # fmt: skip


def end_ids(tokenizer: Any, tokens: list[str]) -> list[int]:
    """Ids of the end tokens that the tokenizer has, in the order given. Raises UserError when it has none."""
    found = [tokenizer.get_vocab()[token] for token in tokens if token in tokenizer.get_vocab()]
    require(bool(found), f"end_tokens: the tokenizer has none of {', '.join(tokens)}")
    return found
