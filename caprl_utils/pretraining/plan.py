"""What the pretraining of a profile needs: commands, nodes, memory per GPU, hours and disk, with the formulas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from caprl_utils import gpus as gpu
from caprl_utils.errors import UserError
from caprl_utils.paths import shown
from caprl_utils.pretraining import launch
from caprl_utils.pretraining.arguments import accumulation, num_steps, stage_of, world_size
from caprl_utils.pretraining.sets import CAPRL, Training, rows_of, wanted
from caprl_utils.pretraining.stages import folder_of
from caprl_utils.schema import Pretraining, Profile

# Parameters of the paper's settings, in billions (model cards' configurations; vlm_init's tests count them).
BILLIONS: Mapping[str, Mapping[str, float]] = {
    "qwen2.5-3b": {"vision_tower": 0.63, "projector": 0.04, "language_model": 3.09},
    "qwen2.5-7b": {"vision_tower": 0.63, "projector": 0.05, "language_model": 7.62},
    "internlm2.5-7b-clip": {"vision_tower": 0.30, "projector": 0.02, "language_model": 7.74},
}
TOKENS_PER_ROW = {
    "align": 450,
    "further": 1100,
    "sft": 900,
}  # ours: a guess; the token budget check counts them
IMAGE_BYTES = 120_000  # ours: a JPEG of the caption sets on average, a guess
ACTIVATION_GB = {
    "align": 22.0,
    "further": 14.0,
    "sft": 14.0,
}  # ours: a guess; align keeps all of the frozen LLM's


class UnknownSize(UserError):
    """A plan needs the size of something that is not known here. what: a role or setting, as a user wrote it."""

    def __init__(self, what: str, message: str):
        super().__init__(message)
        self.what = what


@dataclass(frozen=True)
class PlanRow:
    """One stage of one setting. disk_gb: of models and checkpoints; trainings share the images (`image_gb`).
    commands: what LLaMA-Factory is started with. formulas: quantity -> how it was computed, with the numbers in.
    """

    setting: str
    stage: str
    runs: int
    rows: int
    nodes: int
    gpus: int
    memory_gb: float
    hours: float
    disk_gb: float
    commands: tuple[str, ...]
    formulas: Mapping[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.setting}, stage {self.stage}: {self.runs} trainings of {self.rows:,} rows in all on "
            f"{self.nodes} nodes, {self.gpus} GPUs; {self.memory_gb:.0f} GB a GPU, {self.hours:.1f} hours, "
            f"{self.disk_gb:.0f} GB of disk beside the images",
            *(f"  {name} = {text}" for name, text in self.formulas.items()),
            *(f"  $ {command}" for command in self.commands),
        ]


def plan_pretraining(profile: Profile) -> list[PlanRow]:
    """A row per setting and stage. Raises UserError when a batch does not divide, UnknownSize for a setting of which
    no parameter counts are known.
    """
    settings = profile.pretraining
    if settings.gpus_per_node == 0:
        return [_on_cpu(profile, name) for name in settings.settings]
    groups: dict[tuple[str, str], list[Training]] = {}
    for training in wanted(settings):
        groups.setdefault((training.setting, training.stage), []).append(training)
    return [_row(profile, setting, stage, group) for (setting, stage), group in sorted(groups.items())]


def rows_by_images(profile: Profile) -> dict[str, int]:
    """Rows of the largest data set of each image set; smaller ones are samples of it."""
    found: dict[str, int] = {}
    for training in wanted(profile.pretraining):
        images = training.captions.images if training.captions else training.stage
        found[images] = max(found.get(images, 0), training.num_rows(profile.pretraining))
    return found


def image_gb(profile: Profile) -> float:
    """Disk of all images, each counted once."""
    return sum(rows_by_images(profile).values()) * IMAGE_BYTES / 1e9


def captions_by_caprl(profile: Profile) -> dict[str, int]:
    """Image set -> captions that the trained captioner writes for it."""
    found: dict[str, int] = {}
    for training in wanted(profile.pretraining):
        if (one := training.captions) is not None and one.captioner == CAPRL:
            found[one.images] = max(found.get(one.images, 0), rows_of(one, profile.pretraining))
    return found


def node_commands(profile: Profile) -> list[str]:
    """What to type: it starts everything that `PlanRow.commands` lists."""
    if profile.pretraining.nodes > 1:
        return ["$ sbatch configs/slurm/llamafactory.slurm"]
    return [f"$ make 04_llamafactory_pretraining PROFILE={profile.name}"]


def environment_line(profile: Profile) -> str:
    """The variables with which the commands of `PlanRow` run, here as a shell would set them."""
    found = {
        "PATH": f"{shown(launch.ENVIRONMENT)}/bin:$PATH", "PYTHONPATH": f"{shown(launch.SITE)}:.",
        **launch.torchrun_variables(profile.pretraining),
    }  # fmt: skip
    return " ".join(["export", *(f"{name}={value}" for name, value in found.items())])


def state_bytes(parts: Mapping[str, float], trains: Iterable[str], settings: Pretraining) -> float:
    """Bytes per GPU for weights, gradients and AdamW's state.

    bf16 weights for all, and for what trains 2 bytes of gradient and 12 of fp32 copy and two moments; ZeRO-3
    divides all by the GPUs, ZeRO-2 all but the weights.
    """
    everything = sum(parts.values())
    trained = sum(parts[part] for part in set(trains))
    gpus = world_size(settings)
    if settings.deepspeed == "zero3":
        return (2 * everything + 14 * trained) / gpus
    if settings.deepspeed == "zero2":
        return 2 * everything + 14 * trained / gpus
    return 2 * everything + 14 * trained


def _row(profile: Profile, setting: str, stage: str, group: Sequence[Training]) -> PlanRow:
    settings, gpus = profile.pretraining, world_size(profile.pretraining)
    chosen = stage_of(settings, stage, setting)
    parts = _parts(setting)
    rows = sum(training.num_rows(settings) for training in group)
    steps = sum(num_steps(chosen, training.num_rows(settings)) for training in group)
    tokens = rows * TOKENS_PER_ROW[stage] * chosen.num_epochs
    everything, trained = sum(parts.values()), sum(parts[part] for part in set(chosen.trains))
    state = state_bytes(parts, chosen.trains, settings) / 1e9
    passes = (
        4 if stage == "align" else 8
    )  # forward and backward through all, weights' gradients, recomputation
    hours = gpu.hours(passes * everything * tokens, gpu.TRAIN_USE) / gpus
    saved = len(group) * 2 * everything / 1e9 + 2 * (2 * everything + 12 * trained) / 1e9
    return PlanRow(
        setting, stage, len(group), rows, settings.nodes, gpus,
        state + ACTIVATION_GB[stage], hours, saved, tuple(_command(profile, training) for training in group),
        {
            "batch": f"{gpus} GPUs x {chosen.micro_batch_size} x {accumulation(settings, chosen)} accumulated "
                     f"= {chosen.batch_size}; {steps:,} steps",
            "memory": f"state {state:.1f} GB (2 bytes x {everything / 1e9:.2f} G parameters + 14 x "
                      f"{trained / 1e9:.2f} G trained, {settings.deepspeed or 'not'} divided by {gpus} GPUs) + "
                      f"activations {ACTIVATION_GB[stage]:.0f} GB (a guess)",
            "hours": f"{passes} x {everything / 1e9:.2f} G x {tokens / 1e9:.2f} G tokens / ({gpus} x "
                     f"{gpu.PEAK_FLOPS / 1e12:.0f} TFLOP/s x {gpu.TRAIN_USE})",
            "disk": f"{len(group)} models x 2 bytes x {everything / 1e9:.2f} G + two checkpoints x (2 bytes x "
                    f"{everything / 1e9:.2f} G + 12 x {trained / 1e9:.2f} G trained)",
        },
    )  # fmt: skip


def _parts(setting: str) -> dict[str, float]:
    if setting not in BILLIONS:
        raise UnknownSize(
            f"setting {setting}",
            f"pretraining.settings: no parameter counts of {setting!r}; there are {', '.join(BILLIONS)}",
        )
    return {part: 1e9 * count for part, count in BILLIONS[setting].items()}


def _command(profile: Profile, training: Training) -> str:
    """What starts a training on every node."""
    program = f"{shown(launch.ENVIRONMENT)}/bin/llamafactory-cli"
    return f"{program} train {shown(folder_of(profile, training.name) / 'train.yaml')}"


def _on_cpu(profile: Profile, setting: str) -> PlanRow:
    trainings = [t for t in wanted(profile.pretraining) if t.setting == setting]
    settings = profile.pretraining
    rows = round(
        sum(t.num_rows(settings) * stage_of(settings, t.stage, t.setting).num_epochs for t in trainings)
    )
    seconds = len(trainings) * START_SEC + rows * ROW_SEC
    hours = seconds / max(1, profile.pretraining.parallel_runs) / 3600
    return PlanRow(
        setting, "all", len(trainings), rows, 1, 0, 0.0, hours, rows * 10_000 / 1e9,
        (f"make 04_llamafactory_pretraining PROFILE={profile.name}",),
        {"hours": f"({len(trainings)} x {START_SEC:.0f} s of start-up + {rows:,} x {ROW_SEC} s) / "
                  f"{profile.pretraining.parallel_runs} side by side / 3600"},
    )  # fmt: skip


START_SEC, ROW_SEC = 20.0, 0.042  # measured on one core: LLaMA-Factory's start-up, a row of the mini world
