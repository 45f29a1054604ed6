"""What is put together: one YAML of configs/vlm_init per setting, checked and typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from caprl_utils import paths
from caprl_utils.config import nearest
from caprl_utils.errors import UserError
from caprl_utils.schema import Settings, setting

FOLDER = paths.CONFIGS / "vlm_init"


class Donor(Settings):
    """A checkpoint that gives weights."""

    path: str = Field(description="hub id, folder, or zoo:NAME for a model of the small zoo", min_length=1)
    revision: str | None = setting(None, "ours: the hub's current revision unless a commit hash pins it")


class Projector(Settings):
    """How the fresh projector starts. The paper says random, and no more."""

    initialisation: Literal["normal", "torch"] = setting(
        "normal", "ours: Hugging Face's normal(0, std) and zero bias; `torch` is what a bare nn.Linear has"
    )
    std: float = setting(0.02, "ours: initializer_range of both model classes", gt=0)
    seed: int = setting(
        0, "ours: every tensor draws from its own generator, seeded by this and its name", ge=0
    )


class Assembly(Settings):
    """One setting of Table 1: a language model, a vision tower, a fresh projector."""

    name: str = Field(description="the setting's name; the file name of its YAML", min_length=1)
    description: str = setting("", "ours: one line for the reader", False)
    architecture: Literal["qwen2_5_vl", "llava"] = Field(description="the class of the assembled model")
    language: Donor = Field(description="gives language model, head and tokenizer")
    vision: Donor = Field(description="gives vision tower and image processor, and for Qwen2.5-VL the frame")
    projector: Projector = setting(Projector(), "see each key")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "ours: as the language model's checkpoint"
    )
    accepted_differences: list[str] = setting(
        [],
        "ours: hyperparameters in which the vision donor's own language model may differ; the donor's count",
    )
    min_pixels: int | None = setting(None, "ours: the vision donor's own limit (Qwen2.5-VL)", ge=1)
    max_pixels: int | None = setting(None, "ours: the vision donor's own limit (Qwen2.5-VL)", ge=1)
    vision_feature_layer: int = setting(-2, "LLaVA-1.5: features of the last layer but one (llava)", le=-1)
    rename_tokens: dict[str, str] = setting(
        {}, "ours: reserved tokens that get a name, so that no embedding row is added (llava)"
    )
    image_token: str = setting("<image>", "LLaVA-1.5, and what LLaMA-Factory's llava plugin writes (llava)")
    end_tokens: list[str] = setting(
        ["<|im_end|>", "<|endoftext|>"], "ours: chat models end with the first, base models with the second"
    )
    max_shard_bytes: int = setting(2 * 10**9, "ours: memory of the assembly is one shard", False, ge=1)

    @model_validator(mode="after")
    def _keys_fit_the_architecture(self) -> Assembly:
        own = {"qwen2_5_vl": ("min_pixels", "max_pixels", "accepted_differences"),
               "llava": ("vision_feature_layer", "rename_tokens", "image_token")}  # fmt: skip
        for architecture, names in own.items():
            strange = [n for n in names if getattr(self, n) != type(self).model_fields[n].default]
            if architecture != self.architecture and strange:
                raise ValueError(f"{', '.join(strange)} belong(s) to architecture {architecture}")
        return self


def setting_names() -> list[str]:
    """Names of all settings in configs/vlm_init, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_setting(name: str | Path, **overrides: Any) -> Assembly:
    """Read a setting by its name, or from a YAML file by its path; overrides replace top-level keys.

    Raises UserError naming the file, the key and what is wrong with it.
    """
    import yaml

    file = Path(name) if str(name).endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not file.is_file():
        close = nearest(str(name), setting_names())
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"no setting {str(name)!r}{hint} Known settings: {', '.join(setting_names())}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        return Assembly.model_validate({"name": file.stem} | values | overrides)
    except yaml.YAMLError as error:
        raise UserError(f"{paths.shown(file)} is not valid YAML: {error}") from None
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, e['loc'])) or 'setting'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise UserError(f"{paths.shown(file)}: " + "; ".join(problems)) from None
