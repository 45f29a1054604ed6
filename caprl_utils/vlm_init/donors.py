"""Donors: where they come from, their configs, weights and tokenizers.

Everything that can be wrong with a download is found here, before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
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
PICKLED = "pytorch_model*.bin"
CONVERT = (
    "pickled weights are not opened here. If you trust them, save them once as safetensors and name that folder "
    "(with AutoModel and AutoProcessor of transformers: `X.from_pretrained(SOURCE).save_pretrained(FOLDER)`), or "
    "name a `revision` that has safetensors (on the hub often refs/pr/NUMBER, under Community)"
)
FETCH_AGAIN = "the download was interrupted: fetch it again (the hub client continues where it stopped)"


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless the condition holds."""
    if not condition:
        raise UserError(message)


def donor_folder(donor: Donor, prefixes: Iterable[str]) -> Path:
    """A donor's folder on this machine; of the hub's, only shards with tensors of these prefixes are fetched.

    Raises UserError when it is not there and cannot be fetched, or has no safetensors.
    """
    if (made := made_model(donor.path)) is not None:
        return made
    if donor.path.startswith(paths.ZOO_PREFIX) or Path(donor.path).is_dir():
        return Path(paths.resolve_model(donor.path))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    small = ["*.json", "*.jinja", "*.txt", "*.model"]  # configs, tokenizer, processor
    try:
        folder = Path(snapshot_download(donor.path, revision=donor.revision, allow_patterns=small))
        shards = [file for file, names in _files(folder).items() if _some(names, prefixes)] or [SINGLE]
        folder = Path(
            snapshot_download(donor.path, revision=donor.revision, allow_patterns=[*small, *shards])
        )
        if not (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
            raise UserError(_why_no_safetensors(donor))
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"donor {donor.path!r} is no folder here and could not be fetched from the hub: "
            f"{str(error).splitlines()[0]}. Check the name and the network (HF_HUB_OFFLINE must not be set), or name "
            "a folder"
        ) from None


def _why_no_safetensors(donor: Donor) -> str:
    """What the hub has of a donor instead. Raises as the hub's client when it cannot be asked."""
    from huggingface_hub import HfApi

    files = [Path(f) for f in HfApi().list_repo_files(donor.path, revision=donor.revision)]
    name = f"donor {donor.path!r} at revision {donor.revision or 'main'}"
    if pickled := sorted(file.name for file in files if file.match(PICKLED)):
        return f"{name} has no safetensors on the hub, pickled weights only ({pickled[0]}): {CONVERT}"
    return f"{name} has no {SINGLE} and no {INDEX} on the hub; is it a model?"


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


def read_weights(folder: Path, prefixes: Iterable[str] = ("",)) -> Weights:
    """Map a model's tensors with these prefixes; shards that hold none of them need not be there.

    Raises UserError for a missing, cut or foreign file, naming it.
    """
    prefixes, tensors, files = tuple(prefixes), {}, []
    for file, names in _files(folder).items():
        if not _some(names, prefixes):
            continue
        found = _mapped(folder / file)
        if names is not None and (lost := names - found.keys()):
            raise UserError(
                f"{shown(folder / file)} lacks {len(lost)} tensors that {INDEX} promises, {min(lost)} among them; "
                "index and shards are of different checkpoints: fetch the model again"
            )
        files.append(folder / file)
        tensors |= {name: tensor for name, tensor in found.items() if name.startswith(prefixes)}
    if not files:
        raise UserError(_why_no_weights(folder))
    return Weights(folder, tuple(files), tensors)


def _files(folder: Path) -> dict[str, set[str] | None]:
    """File name -> tensors that it should hold (None: whatever is in it)."""
    if not (folder / INDEX).is_file():
        return {SINGLE: None} if (folder / SINGLE).is_file() else {}
    try:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{shown(folder / INDEX)} cannot be read ({error}); {FETCH_AGAIN}") from None
    files: dict[str, set[str] | None] = {}
    for name, file in sorted(weight_map.items(), key=lambda entry: entry[1]):
        files.setdefault(file, set()).add(name)
    return files


def _some(names: set[str] | None, prefixes: Iterable[str]) -> bool:
    return names is None or any(name.startswith(tuple(prefixes)) for name in names)


def _why_no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"no model folder {shown(folder)}"
    if any(folder.glob("*.incomplete")) or any(folder.glob("model-*-of-*.safetensors")):
        return f"{shown(folder)} has parts of a model but no {INDEX}; {FETCH_AGAIN}"
    if pickled := sorted(folder.glob(PICKLED)):
        return f"{shown(folder)} has no safetensors, pickled weights only ({pickled[0].name}): {CONVERT}"
    return f"{shown(folder)} has no {SINGLE} and no {INDEX}; is it a model folder?"


def _mapped(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    require(file.is_file(), f"missing shard {shown(file)}, which {INDEX} names; {FETCH_AGAIN}")
    with open(file, "rb") as opened:
        pointer = opened.read(40).startswith(b"version https://git-lfs")
    require(not pointer, f"{shown(file)} is a git-lfs pointer, not the weights: run `git lfs pull` there")
    try:
        with safe_open(file, "pt") as shard:
            return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    except SafetensorError as error:
        size = file.stat().st_size
        raise UserError(f"{shown(file)} ({size} bytes) is cut or damaged ({error}); {FETCH_AGAIN}") from None


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
