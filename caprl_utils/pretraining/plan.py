"""What the pretraining of a profile needs: commands, nodes, memory per GPU, hours and disk, with the formulas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from caprl_utils import gpus as gpu
from caprl_utils.errors import UserError
from caprl_utils.pretraining.arguments import accumulation, num_steps, stage_of, world_size
from caprl_utils.pretraining.sets import Training, wanted
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
_MASTER_PORT = 29500


@dataclass(frozen=True)
class PlanRow:
    """One stage of one setting. formulas: quantity -> how it was computed, with the numbers in."""

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
            f"{self.disk_gb:.0f} GB of disk",
            *(f"  {name} = {text}" for name, text in self.formulas.items()),
            *(f"  $ {command}" for command in self.commands),
        ]


def plan_pretraining(profile: Profile) -> list[PlanRow]:
    """A row per setting and stage. Raises UserError when a batch does not divide or a setting is unknown."""
    settings = profile.pretraining
    if settings.gpus_per_node == 0:
        return [_on_cpu(profile, name) for name in settings.settings]
    groups: dict[tuple[str, str], list[Training]] = {}
    for training in wanted(settings):
        groups.setdefault((training.setting, training.stage), []).append(training)
    return [_row(profile, setting, stage, group) for (setting, stage), group in sorted(groups.items())]


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
    images = rows * IMAGE_BYTES / 1e9
    saved = len(group) * 2 * everything / 1e9 + 2 * (2 * everything + 12 * trained) / 1e9
    return PlanRow(
        setting, stage, len(group), rows, settings.nodes, gpus,
        state + ACTIVATION_GB[stage], hours, images + saved, _commands(profile, group),
        {
            "batch": f"{gpus} GPUs x {chosen.micro_batch_size} x {accumulation(settings, chosen)} accumulated "
                     f"= {chosen.batch_size}; {steps:,} steps",
            "memory": f"state {state:.1f} GB (2 bytes x {everything / 1e9:.2f} G parameters + 14 x "
                      f"{trained / 1e9:.2f} G trained, {settings.deepspeed or 'not'} divided by {gpus} GPUs) + "
                      f"activations {ACTIVATION_GB[stage]:.0f} GB (a guess)",
            "hours": f"{passes} x {everything / 1e9:.2f} G x {tokens / 1e9:.2f} G tokens / ({gpus} x "
                     f"{gpu.PEAK_FLOPS / 1e12:.0f} TFLOP/s x {gpu.TRAIN_USE})",
            "disk": f"images {images:.0f} GB ({IMAGE_BYTES:,} bytes each; trainings share them) + models and two "
                    f"checkpoints {saved:.0f} GB",
        },
    )  # fmt: skip


def _parts(setting: str) -> dict[str, float]:
    if setting not in BILLIONS:
        raise UserError(
            f"pretraining.settings: no parameter counts of {setting!r}; there are {', '.join(BILLIONS)}"
        )
    return {part: 1e9 * count for part, count in BILLIONS[setting].items()}


def _commands(profile: Profile, group: Sequence[Training]) -> tuple[str, ...]:
    """What to type: one command that runs the chain, and what it starts on each node."""
    settings = profile.pretraining
    make = f"make 04_llamafactory_pretraining PROFILE={profile.name}"
    if settings.nodes == 1:
        return (make,)
    config = f"runs/{profile.name}/pretraining/{group[0].name}/train.yaml"
    variables = (
        f"NNODES={settings.nodes} NPROC_PER_NODE={settings.gpus_per_node} MASTER_ADDR=HOST_0 "
        f"MASTER_PORT={_MASTER_PORT} FORCE_TORCHRUN=1 PYTHONPATH=caprl_utils/pretraining/site"
    )
    return (
        f"on node 0: NODE_RANK=0 MASTER_ADDR=HOST_0 MASTER_PORT={_MASTER_PORT} {make}",
        *(
            f"on node {rank}: NODE_RANK={rank} {variables} .venv-llamafactory/bin/llamafactory-cli train {config}"
            for rank in range(1, settings.nodes)
        ),
    )


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
