"""Donors: their folders, configs, weights and tokenizers, what can be wrong with them, and the two kinds of model that
are put together of them.

Qwen2.5-VL: Qwen2.5 + the vision tower of a Qwen2.5-VL. LLaVA: InternLM2.5 (or another Llama-like model) + CLIP.
Ours, where the paper says nothing: LLaVA-1.5's features and projector; pictures padded to a square, because CLIP's
centre crop cuts off the sides of charts and documents; ``<image>`` and chat marks on reserved rows of the embedding.
InternLM2's weights become transformers' own Llama class, the same function without remote code (modeling_internlm2.py;
InternLM's tools/convert2llama.py). Dynamic rope scaling is left out: it acts only beyond max_position_embeddings
(32,768, kept), and transformers and vLLM each have their own reading of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from caprl_utils import paths
from caprl_utils.errors import UserError
from caprl_utils.paths import shown
from caprl_utils.registry import maker_of
from caprl_utils.schema import Assembly, Donor

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PreTrainedTokenizerFast

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
    if (maker := maker_of(donor.path)) is not None:
        return maker()
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


# The kinds of model

IMAGE_TOKEN = "<image>"  # what LLaMA-Factory's llava plugin writes
LANGUAGES = ("internlm2", "llama", "qwen2", "mistral")  # model types that a LLaVA is made of
INTERNLM_NAMES = {
    "model.tok_embeddings": "model.embed_tokens", "output": "lm_head", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
"""Modules of InternLM2 -> Llama's."""
_SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "rms_norm_eps", "max_position_embeddings", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_OF_QWEN = (
    *_SHAPE, "attention_dropout", "layer_types", "use_sliding_window", "sliding_window", "max_window_layers",
    "tie_word_embeddings",
)  # fmt: skip
_QWENS_MARKS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def qwen_config(setting: Assembly, language: dict[str, Any], vision: dict[str, Any]) -> tuple[Any, list[str]]:
    """The vision donor's config with everything of the language model from the language donor's, and notes."""
    from transformers import Qwen2_5_VLConfig, Qwen2Config

    for donor, raw, name in ((setting.language, language, "qwen2"), (setting.vision, vision, "qwen2_5_vl")):
        kind = raw.get("model_type")
        require(kind == name, f"{donor.path} is a {kind!r} model; this setting needs {name!r} here")
    text, frame = Qwen2Config.from_dict(language), Qwen2_5_VLConfig.from_dict(vision)
    ours, theirs = language_facts(text), language_facts(frame.text_config)
    theirs["tie_word_embeddings"] = frame.tie_word_embeddings  # the hub's configs tie the head at the root
    differing = "; ".join(f"{key} {ours[key]!r} and {theirs[key]!r}" for key in ours if ours[key] != theirs[key])
    require(not differing, f"{setting.language.path} and the language model inside {setting.vision.path} do not fit "
            f"together: {differing}. Take the vision tower from the Qwen2.5-VL whose language model has the donor's "
            "size")  # fmt: skip
    rope = {**text.rope_parameters, "mrope_section": list(frame.text_config.rope_parameters["mrope_section"])}
    config = Qwen2_5_VLConfig(
        text_config={key: getattr(text, key) for key in _OF_QWEN} | {"rope_parameters": rope},
        vision_config=frame.vision_config.to_dict() | {"out_hidden_size": text.hidden_size},
        tie_word_embeddings=text.tie_word_embeddings,  # at the root: older readers do not look further down
        **{key: getattr(frame, key) for key in _QWENS_MARKS},
    )
    return config, ["embeddings of the vision special tokens are the language model's own, untrained there"]


def qwen_processor(setting: Assembly, config: Any, language: Path, vision: Path) -> tuple[Any, int]:
    """The vision donor's processor (its chat template knows images) with the setting's limit, and most image tokens."""
    from transformers import Qwen2_5_VLProcessor

    ours, theirs = (fast_tokenizer(folder).get_vocab() for folder in (language, vision))
    wrong = sorted(token for token, number in theirs.items() if ours.get(token) != number)
    told = ", ".join(f"{token!r} ({ours.get(token)} and {theirs[token]})" for token in wrong[:5])
    require(not wrong, f"the tokenizers of {setting.language.path} and {setting.vision.path} do not fit together: "
            f"{len(wrong)} tokens have other ids, or none in the first: {told}")  # fmt: skip
    made = Qwen2_5_VLProcessor.from_pretrained(vision)
    images = made.image_processor
    most = setting.max_pixels or images.size["longest_edge"]
    images.size = dict(images.size) | {"longest_edge": most}
    return made, most // (images.patch_size * images.merge_size) ** 2


def llava_config(setting: Assembly, language: dict[str, Any], vision: dict[str, Any]) -> tuple[Any, list[str]]:
    """The new model's config from both config.json, and notes."""
    import transformers

    kind, path = language.get("model_type"), setting.language.path
    require(kind in LANGUAGES, f"{path} is a {kind!r} model; a LLaVA takes {', '.join(LANGUAGES)}")
    is_internlm = kind == "internlm2"
    text = llama_config(language) if is_internlm else transformers.CONFIG_MAPPING[kind].from_dict(language)
    kind, path = vision.get("model_type"), setting.vision.path
    values = vision if kind == "clip_vision_model" else vision.get("vision_config", {})
    known = kind == "clip" or values.get("model_type") == "clip_vision_model"
    require(known, f"{path} is a {kind!r} model, not CLIP and none with a CLIP tower")
    drop = ("model_type", "dtype", "torch_dtype", "architectures", "transformers_version")
    tower = transformers.CLIPVisionConfig(**{k: v for k, v in values.items() if k not in drop})
    config = transformers.LlavaConfig(
        text_config=text, vision_config=tower, image_token_index=0,  # set with the tokenizer
        image_seq_length=(tower.image_size // tower.patch_size) ** 2, projector_hidden_act="gelu",
        vision_feature_select_strategy="default", vision_feature_layer=-2,  # as LLaVA-1.5
        tie_word_embeddings=text.tie_word_embeddings,
    )  # fmt: skip
    notes = [f"{old} of the tokenizer is now {new}: its embedding is an unused row of the language model"
             for old, new in setting.rename_tokens.items()]  # fmt: skip
    if is_internlm:
        notes += ["InternLM2's fused wqkv is split into Llama's q, k and v; dynamic rope scaling is left out"]
    return config, notes


def llava_processor(setting: Assembly, config: Any, language: Path, vision: Path) -> tuple[Any, int]:
    """Processor (the language donor's tokenizer, images padded to a square), and tokens of an image. The config gets
    the image token's id.
    """
    from transformers import CLIPImageProcessor, LlavaImageProcessor, LlavaProcessor

    tokenizer, path = renamed(fast_tokenizer(language), setting.rename_tokens), setting.language.path
    ids, limit = tokenizer.get_vocab(), config.text_config.vocab_size
    require(IMAGE_TOKEN in ids, f"{IMAGE_TOKEN!r} is not in the tokenizer of {path}; give a reserved token that name "
            "by rename_tokens")  # fmt: skip
    require(max(ids.values()) < limit, f"the tokenizer of {path} has ids beyond vocab_size {limit}")
    config.image_token_index = ids[IMAGE_TOKEN]
    theirs, side = CLIPImageProcessor.from_pretrained(vision), config.vision_config.image_size
    require((crop := theirs.crop_size["height"]) == side, f"{shown(vision)}: the image processor makes {crop} pixels, "
            f"the tower expects {side}")  # fmt: skip
    template = Path(__file__).with_name("llava_chatml.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = template.replace("IMAGE_TOKEN", IMAGE_TOKEN)
    made = LlavaProcessor(
        image_processor=LlavaImageProcessor(
            do_pad=True, size={"shortest_edge": side}, crop_size={"height": side, "width": side},
            image_mean=theirs.image_mean, image_std=theirs.image_std,
        ),
        tokenizer=tokenizer, patch_size=config.vision_config.patch_size, chat_template=tokenizer.chat_template,
        vision_feature_select_strategy="default", image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # the class token, which "default" then leaves out
    )  # fmt: skip
    return made, config.image_seq_length


# stored: beginning of a name in the class -> in the hub's checkpoints. vLLM 0.31 reads a CLIP tower under
# `vision_model.` only, and a model that transformers built itself is saved without that level.
# language, tower: what the names of the donors' tensors there begin with; first: a tensor of any such tower.
# config, processor raise UserError for donors of another class, size or vocabulary.
ARCHITECTURES = {
    "qwen2_5_vl": SimpleNamespace(
        stored={"model.visual.": "visual.", "model.language_model.": "model."},
        language="", tower="visual.", first="patch_embed.proj.weight",
        config=qwen_config, processor=qwen_processor,
    ),
    "llava": SimpleNamespace(
        stored={
            "model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
            "model.vision_tower.": "vision_tower.vision_model.",
            "model.multi_modal_projector.": "multi_modal_projector.",
        },
        language="language_model.", tower="vision_tower.vision_model.", first="embeddings.class_embedding",
        config=llava_config, processor=llava_processor,
    ),
}  # fmt: skip


def donor_tensors(config: Any, language: Tensors, vision: Tensors) -> dict[str, torch.Tensor]:
    """All tensors of both donors under the stored names of the new model with this config."""
    kind = ARCHITECTURES[config.model_type]
    prefix = next((name.removesuffix(kind.first) for name in vision if name.endswith(kind.first)), None)
    require(prefix is not None, f"the vision donor has no tower of this kind: none of its tensors is a {kind.first}")
    if "model.tok_embeddings.weight" in language:
        language = llama_tensors(language, config.text_config)
    tower = {name.removeprefix(prefix): tensor for name, tensor in vision.items() if name.startswith(prefix)}
    return {
        **{f"{kind.language}{name}": tensor for name, tensor in language.items()},
        **{f"{kind.tower}{name}": tensor for name, tensor in tower.items()},
    }


# InternLM2 as a Llama


def llama_config(internlm: Mapping[str, Any]) -> LlamaConfig:
    """config.json of an InternLM2 model -> LlamaConfig. Raises UserError for a rope scaling that is not known. Its flag
    `bias` is Llama's attention_bias: both cover q, k, v and o.
    """
    from transformers import LlamaConfig

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": internlm.get("rope_theta", 10_000)}
    scaling = internlm.get("rope_scaling") or {}
    kind = scaling.get("type") or scaling.get("rope_type")
    require(kind in (None, "dynamic", "linear"), f"rope scaling {kind!r} of the InternLM2 config is not known; dynamic "
            "and linear are")  # fmt: skip
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": scaling["factor"]}
    return LlamaConfig(
        **{key: internlm[key] for key in _SHAPE if key in internlm},
        attention_bias=bool(internlm.get("bias", False)), mlp_bias=False, rope_parameters=rope,
        tie_word_embeddings=bool(internlm.get("tie_word_embeddings", False)),
    )  # fmt: skip


def llama_tensors(internlm: Tensors, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Tensors of InternLM2 under Llama's names. Its fused ((heads + 2 kv heads) * head_dim, ...) holds, for each
    key-value head, the rows of its query heads, its key, its value. Raises UserError for other rows.
    """
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    rows, found = (heads + 2 * kv_heads) * width, {}
    for name, tensor in internlm.items():
        stem, fused, kind = name.partition("attention.wqkv.")
        if fused:
            require(tensor.shape[0] == rows, f"a fused wqkv has {tensor.shape[0]} rows, {heads} heads and {kv_heads} "
                    f"key-value heads of {width} make {rows}; wrong config.json?")  # fmt: skip
            by_head = tensor.unflatten(0, (kv_heads, heads // kv_heads + 2, width))
            found[f"{stem}self_attn.q_proj.{kind}"] = by_head[:, :-2].flatten(0, 2)
            found[f"{stem}self_attn.k_proj.{kind}"] = by_head[:, -2].flatten(0, 1)
            found[f"{stem}self_attn.v_proj.{kind}"] = by_head[:, -1].flatten(0, 1)
        else:
            for old, new in INTERNLM_NAMES.items():
                name = name.replace(f"{old}.", f"{new}.")
            found[name] = tensor
    return found
