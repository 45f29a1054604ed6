"""Experiments: one YAML in configs/experiments per training run, over the settings of a profile.

    python -m caprl_utils.rl.experiment caprl mini     what the run would use

    extends: paper              # another experiment; its values first
    item: Table 5, N = 1        # what of the paper it belongs to
    rl: {rounds: 1}             # values over the profile's section rl
    data: {num_images: 100}     # which images and questions
    reward: {length: {weight: 0.2}}
    training: {vision_tower: false}

The file's name is the experiment's; unknown keys and bad values are errors that name file, key and nearest
valid key.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from caprl_utils import paths
from caprl_utils.config import load_profile, merge, nearest, read_yaml
from caprl_utils.errors import UserError, command_line
from caprl_utils.schema import Profile, Settings, setting

EXPERIMENTS = paths.CONFIGS / "experiments"


class Data(Settings):
    """Which images and questions the run trains on."""

    file: str = setting(
        "curation/main/qa.parquet", "ours: under the profile's run folder (CapRL-QA-75K's schema)"
    )
    num_images: Annotated[int, Field(ge=1)] | Literal["ablation"] | None = setting(
        None, "ours: None takes rl.num_images of the profile, `ablation` its ablations.num_images"
    )
    image_share: float = setting(1.0, "ours: of those images, so many (Figure 5 right)", gt=0, le=1)
    ids: list[str] = setting(
        [], "ours: shell patterns of image ids; empty takes all (Figure 5 left: kinds of images)"
    )
    questions_per_image: int | None = setting(None, "ours: None keeps all questions (Table 4: 1, 2, 3)", ge=1)
    min_questions: int = setting(
        1, "ours: images with fewer are left out (Table 4 compares the same images)", ge=1
    )


class Length(Settings):
    """Length term: `weight` up to `full_share` of rl.max_completion_tokens, falling linearly to 0 at
    `zero_share` (CapRL++, arXiv 2606.09393).
    """

    full_share: float = setting(0.5, "CapRL++: tau1, 2048 of 4096 tokens", ge=0, le=1)
    zero_share: float = setting(0.75, "CapRL++: tau2, 3072 of 4096 tokens", gt=0, le=1)
    weight: float = setting(0.2, "CapRL++", gt=0)

    @model_validator(mode="after")
    def _falls(self) -> Length:
        if self.zero_share <= self.full_share:
            raise ValueError(f"zero_share {self.zero_share} is not above full_share {self.full_share}")
        return self


class Reward(Settings):
    """What a caption is rewarded for. Kind and rounds of the QA reward stand in the profile's section rl."""

    judge: Literal["qa", "vlm", "unified"] = setting(
        "qa", "paper: QA; its Figure 1c compares a VLM judge (1-5) and UnifiedReward"
    )
    reader: Literal["reward_reader", "prism_reader"] = setting(
        "reward_reader", "paper: the reward's own reader; ours: the evaluation's, for the swap of readers"
    )
    min_letter_mass: float = setting(
        0.5, "ours: below it the option letters do not say what the reader would answer", ge=0, le=1
    )
    length: Length | None = setting(None, "paper: no length term")

    @property
    def role(self) -> str:
        """Which of the profile's models scores the captions."""
        return {"qa": self.reader, "vlm": "vlm_judge", "unified": "reward_judge"}[self.judge]


class Lora(Settings):
    """Low-rank adapters instead of all weights."""

    rank: int = setting(64, "ours", ge=1)
    alpha: int = setting(128, "ours: twice the rank", ge=1)
    dropout: float = setting(0.0, "ours: keeps the policy equal to its rollouts", ge=0, lt=1)


class Training(Settings):
    """What trains, and how the work is laid out on the machine."""

    vision_tower: bool = setting(True, "ours: the paper does not say; the released script freezes nothing")
    projector: bool = setting(True, "as vision_tower")
    language_model: bool = setting(True, "as vision_tower")
    lora: Lora | None = setting(None, "paper: full fine-tuning")
    micro_batch_size: int | None = setting(
        None,
        "ours: captions per forward and backward; None: all on a CPU, 4 on a GPU",
        affects_output=False,
        ge=1,
    )
    gradient_checkpointing: bool | None = setting(None, "ours: None: on a GPU only", affects_output=False)
    lr_schedule: Literal["constant_with_warmup", "cosine_with_min_lr"] = setting(
        "constant_with_warmup", "ours: the paper says nothing"
    )
    rollout: Literal["transformers", "vllm_colocate", "vllm_server"] = setting(
        "transformers", "ours: needs nothing else; vLLM for long captions on GPUs"
    )
    vllm_memory_share: float = setting(
        0.3, "TRL's default: share of a GPU for colocated vLLM", False, gt=0, lt=1
    )
    vllm_server_url: str = setting("http://127.0.0.1:8010", "ours: where `vllm serve` listens", False)
    accelerate_config: str | None = setting(
        None,
        "ours: a file of configs/accelerate for several processes; None: one per GPU",
        affects_output=False,
    )


class Experiment(Settings):
    """One training run."""

    name: str = Field(description="the file's name", min_length=1)
    description: str = setting("", "ours: one line for the reader", affects_output=False)
    item: str = setting("", "what of the paper it belongs to", affects_output=False)
    size: Literal["main", "ablation"] = setting(
        "main", "ours: `ablation` takes ablations.steps of the profile"
    )
    rl: dict[str, Any] = setting({}, "values over the profile's section rl")
    data: Data = setting(Data(), "see each key")
    reward: Reward = setting(Reward(), "see each key")
    training: Training = setting(Training(), "see each key")


def experiment_names() -> list[str]:
    """Names of all experiments, sorted."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


def load_experiment(name: str, profile: str) -> tuple[Experiment, Profile]:
    """The experiment, and the profile with the experiment's values in its section rl.

    Raises UserError naming file, key and nearest valid key.
    """
    base = load_profile(profile)  # an error of the profile alone is told as such
    file, values = _layers(name, seen=[])
    values = merge(_preset(base.rl.preset), values)
    values.setdefault("name", file.stem)
    try:
        experiment = Experiment.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(item)}" for item in error.errors())
        raise UserError(f"{paths.shown(file)}:\n{problems}") from None
    if experiment.data.num_images == "ablation":
        data = experiment.data.model_copy(update={"num_images": base.ablations.num_images})
        experiment = experiment.model_copy(update={"data": data})
    steps = base.ablations.steps if experiment.size == "ablation" else None
    over = {**({} if steps is None else {"steps": steps}), **experiment.rl}
    if not over:
        return experiment, base
    try:
        return experiment, load_profile(profile, {"rl": over})
    except UserError as error:
        raise UserError(f"{paths.shown(file)}, section rl, over profile {profile}: {error}") from None


def _preset(name: str | None) -> dict[str, Any]:
    """What an experiment made for the profile's hardware says itself of training and rl."""
    if name is None:
        return {}
    _layers(name, seen=[])  # names it when it is not there
    own = read_yaml(EXPERIMENTS / f"{name}.yaml")
    return {section: own[section] for section in ("rl", "training") if section in own}


def _layers(name: str, seen: list[Path]) -> tuple[Path, dict[str, Any]]:
    file = Path(name) if name.endswith((".yaml", ".yml")) else EXPERIMENTS / f"{name}.yaml"
    if not file.is_file():
        close = nearest(name, experiment_names())
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"no experiment {name!r}{hint} Known: {', '.join(experiment_names())}")
    if file in seen:
        raise UserError(f"{paths.shown(file)}: `extends` goes round in a circle")
    values = read_yaml(file)
    parent = values.pop("extends", None)
    if parent is None:
        return file, values
    _, base = _layers(str(parent), [*seen, file])
    return file, merge(base, {"description": "", "item": "", **values})


def _explain(item: Any) -> str:
    key = ".".join(map(str, item["loc"]))
    if item["type"] != "extra_forbidden":
        return f"{key}: {item.get('input')!r}: {item['msg']}"
    fields = list(_section(item["loc"][:-1]).model_fields)
    close = nearest(str(item["loc"][-1]), fields)
    hint = (
        f"did you mean {'.'.join([*map(str, item['loc'][:-1]), close[0]])}?" if close else ", ".join(fields)
    )
    return f"unknown key {key} (value {item.get('input')!r}); {hint if close else 'valid keys here: ' + hint}"


def _section(loc: tuple[str | int, ...]) -> type[BaseModel]:
    section: Any = Experiment
    for part in loc:
        section = section.model_fields[str(part)].annotation
        if get_origin(section) in (Union, UnionType):
            section = next(kind for kind in get_args(section) if kind is not type(None))
    return section


@command_line
def main(argv: list[str]) -> int:
    """Show an experiment over a profile; returns the exit status."""
    if len(argv) != 2:
        print("usage: python -m caprl_utils.rl.experiment EXPERIMENT PROFILE", file=sys.stderr)
        return 2
    experiment, profile = load_experiment(*argv)
    shown = {**experiment.model_dump(mode="json"), "rl": profile.rl.model_dump(mode="json")}
    print(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
