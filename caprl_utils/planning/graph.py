"""The notebooks of a reproduction as steps, each with what it costs and how that was counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from caprl_utils import gpus
from caprl_utils.errors import UserError, nearest
from caprl_utils.pretraining import plan as pretraining
from caprl_utils.pretraining.plan import UnknownSize
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.rl.ablations import planned
from caprl_utils.rl.plan import CAPTION_TOKENS, IMAGE_TOKENS, QUESTION_TOKENS, plan_rl, size_of
from caprl_utils.runner import times
from caprl_utils.runner.cli import outdated
from caprl_utils.schema import Profile

WRITTEN_TOKENS = 600  # ours: five questions in the paper's format
IMAGE_BYTES = 150_000  # ours: an image of the RL set
_WEIGHT_BYTES = 2  # served in bfloat16
_SERVED_SHARE = 0.7  # of a GPU's memory; the rest holds keys and values


@dataclass(frozen=True)
class Step:
    """One notebook. gpus: at once; gpu_hours: None on a CPU and where a size is unknown; minutes: measured, None where
    never; unknown: the role or setting whose size is not known.

    details: lines that say how the figures were counted.
    """

    command: str
    makes: str
    outdated: bool
    gpus: int = 0
    gpu_hours: float | None = None
    minutes: float | None = None
    disk_gb: float = 0.0
    details: Sequence[str] = field(default_factory=tuple)
    unknown: str | None = None

    @property
    def name(self) -> str:
        """Of the notebook."""
        return self.command.split()[-1].partition(":")[0]

    def lines(self) -> list[str]:
        """For people."""
        state = "to do" if self.outdated else "done, up to date"
        needs = [
            f"{self.disk_gb:,.1f} GB of disk" if self.unknown is None else f"size of {self.unknown} unknown"
        ]
        if self.minutes is not None:
            needs.insert(0, f"{self.minutes:.1f} minutes (measured)")
        if self.gpu_hours is not None:
            cost = self.gpu_hours * gpus.DOLLARS_PER_HOUR
            needs.insert(
                0,
                f"{self.gpus} GPUs at once, {self.gpu_hours:,.0f} GPU-hours, about {cost:,.0f} dollars, "
                f"{self.gpu_hours / max(1, self.gpus):,.1f} hours",
            )
        return [
            f"$ {self.command}",
            f"  {self.makes} [{state}]",
            f"  {'; '.join(needs)}",
            *(f"    {line}" for line in self.details),
        ]


MAKES = {
    "00_quickstart_captioning": "captions of a folder through a served model",
    "01_qa_curation": "questions about the images, filtered",
    "02_initialize_vlm_3b": "a VLM put together from a language model and a vision tower",
    "03_caprl_rl_training": "captioners trained by their rewards; Tables 4 to 6, Figures 1c and 5",
    "04_llamafactory_pretraining": "VLMs pretrained on caption sets; Tables 1 and 2, Figure 4",
    "05_prism_evaluation": "captions scored by a reader that sees only them; Table 3",
    "06_tables_and_figures": "every table, figure, claim and page from the results",
}


def steps(profile: Profile, notebooks: Sequence[str]) -> list[Step]:
    """A step per notebook, in order. Raises UserError for an unknown one."""
    stale, known = outdated(notebooks, profile), times.expected(profile.name)
    on_gpus = profile.pretraining.gpus_per_node > 0
    found = []
    for text in notebooks:
        name, *own = text.split(":")
        if name not in MAKES:
            close = nearest(name, list(MAKES))
            raise UserError(f"no notebook {name!r}{f'; did you mean {close[0]}?' if close else ''}")
        sec = known.get("-".join([name, *own]))
        figures = _counted(profile, name) if on_gpus else {"details": _sizes(profile, name)}
        found.append(Step(
            command=f"{_RUNNER} --profile {profile.name} {text}", makes=MAKES[name], outdated=stale[text],
            minutes=None if sec is None or on_gpus else sec / 60, **figures,
        ))  # fmt: skip
    return found


_RUNNER = ".venv/bin/python -m caprl_utils.runner"


def _counted(profile: Profile, name: str) -> dict:
    """What a step costs on GPUs; of a model whose size nobody knows, that it is not known."""
    try:
        return _COUNTS.get(name, _nothing)(profile)
    except UnknownSize as error:
        return {"unknown": error.what, "details": (str(error),)}


def _nothing(profile: Profile) -> dict:
    return {"details": ("on a CPU, minutes",)}


def _sizes(profile: Profile, name: str) -> tuple[str, ...]:
    """What a profile without GPUs does in a notebook."""
    rl, more = profile.rl, profile.ablations
    told = {
        "01_qa_curation": f"{profile.images.num_images} images x {profile.curation.questions_per_image} questions",
        "03_caprl_rl_training": f"{rl.steps} steps of {rl.prompts_per_step} images x {rl.group_size} captions, "
        f"{len(rl.seeds)} seeds; {len(planned(profile)) - len(rl.seeds)} more trainings, most of "
        f"{more.steps or rl.steps} steps",
        "04_llamafactory_pretraining": "; ".join(
            f"{row.setting}: {row.runs} trainings, {row.rows:,} rows"
            for row in pretraining.plan_pretraining(profile)
        ),
        "05_prism_evaluation": f"{len(profile.prism.benchmarks)} benchmarks x {profile.prism.num_samples} questions",
    }
    return (told[name],) if name in told else ()


def serving_gpus(weights: float) -> int:
    """GPUs that hold a model in bfloat16, a power of two as tensor parallelism wants it."""
    needed = weights * _WEIGHT_BYTES / (gpus.GB * 1e9 * _SERVED_SHARE)
    return 2 ** max(0, math.ceil(math.log2(max(needed, 1e-9))))


def _weights(profile: Profile, role: str) -> float:
    size = size_of(profile.models[role].path)
    if size is None:
        raise UnknownSize(
            role,
            f"models.{role}: nothing is known about the size of {profile.models[role].path!r} until it is here",
        )
    return size.weights


def _curation(profile: Profile) -> dict:
    images, settings = profile.images.num_images, profile.curation
    writer, checker = (_weights(profile, role) for role in ("question_writer", "question_filter"))
    write = gpus.hours(2 * writer * images * (IMAGE_TOKENS + WRITTEN_TOKENS), gpus.GENERATE_USE)
    answers = images * settings.questions_per_image * settings.rounds
    read = gpus.hours(2 * checker * answers * (IMAGE_TOKENS + 2 * QUESTION_TOKENS), gpus.READ_USE)
    return {
        "gpus": serving_gpus(writer) + serving_gpus(checker), "gpu_hours": write + read,
        "disk_gb": images * IMAGE_BYTES / 1e9,
        "details": (
            f"writing {write:,.0f} = 2 x {writer:.3g} x {images:,} images x {IMAGE_TOKENS + WRITTEN_TOKENS} tokens / "
            f"({gpus.PEAK_FLOPS:.3g} x {gpus.GENERATE_USE}); images that the filter drops come on top",
            f"filtering {read:,.0f} = 2 x {checker:.3g} x {answers:,} answers, with and without image / "
            f"({gpus.PEAK_FLOPS:.3g} x {gpus.READ_USE})",
        ),
    }  # fmt: skip


def _training(profile: Profile) -> dict:
    rows = plan_rl(profile)
    values = {row["item"]: row["value"] for row in rows}
    total = next(row["value"] for row in rows if row["item"].startswith("GPU-hours of all"))
    policy, _ = (_weights(profile, role) for role in ("policy", "reward_reader"))
    if total is None:
        raise UnknownSize("a judge", "the size of a model that judges captions is not known until it is here")
    count = len(planned(profile))
    disk = (
        (count * 4 + 2 * 12) * policy / 1e9
    )  # a finished model each, and two checkpoints with their optimizer
    return {
        "gpus": values["processes"], "gpu_hours": total, "disk_gb": disk,
        "details": (
            *(f"{row['item']}: {_shown(row['value'])} {row['unit']}".rstrip()
              + (f" = {row['formula']}" if row["formula"] else "") for row in rows),
            f"disk {disk:,.0f} GB = ({count} models x 4 + 2 checkpoints x 12 bytes) x {policy:.3g}",
        ),
    }  # fmt: skip


def _pretraining(profile: Profile) -> dict:
    rows, images = pretraining.plan_pretraining(profile), pretraining.rows_by_images(profile)
    sets, policy = pretraining.captions_by_caprl(profile), _weights(profile, "policy")
    many, shared = sum(sets.values()), pretraining.image_gb(profile)
    writing = gpus.hours(2 * policy * many * (IMAGE_TOKENS + CAPTION_TOKENS), gpus.GENERATE_USE)
    return {
        "gpus": max(row.gpus for row in rows), "gpu_hours": writing + sum(row.hours * row.gpus for row in rows),
        "disk_gb": shared + sum(row.disk_gb for row in rows),
        "details": (
            *pretraining.node_commands(profile),
            f"captions of {many:,} images first ({_listed(sets)}): {writing:,.0f} GPU-hours = 2 x {policy:.3g} x "
            f"{IMAGE_TOKENS + CAPTION_TOKENS} tokens each / ({gpus.PEAK_FLOPS:.3g} x {gpus.GENERATE_USE})",
            f"images {shared:,.0f} GB, shared by all trainings = {pretraining.IMAGE_BYTES:,} bytes x "
            f"({_listed(images)})",
            "LLaMA-Factory is started on each node by the commands below, with "
            f"`{pretraining.environment_line(profile)}`",
            *(line for row in rows for line in row.lines()),
        ),
    }  # fmt: skip


def _listed(counts: Mapping[str, int]) -> str:
    return " + ".join(f"{count:,} {name}" for name, count in counts.items())


def _prism(profile: Profile) -> dict:
    questions = 0
    for name in profile.prism.benchmarks:
        size = get_benchmark(name).size
        rows = size.rows if size is not None and size.rows is not None else 1000
        questions += min(rows, profile.prism.num_samples or rows)
    captions = questions * profile.prism.captions_per_image
    policies = 1 + len(planned(profile))
    each = {
        role: _weights(profile, role) for role in ("policy", "captioner_7b", "captioner_72b", "prism_reader")
    }
    weights = policies * each["policy"] + each["captioner_7b"] + each["captioner_72b"]
    write = gpus.hours(2 * weights * captions * (IMAGE_TOKENS + CAPTION_TOKENS), gpus.GENERATE_USE)
    reads = captions * (policies + 2) * (CAPTION_TOKENS + QUESTION_TOKENS)
    read = gpus.hours(2 * each["prism_reader"] * reads, gpus.READ_USE)
    return {
        "gpus": serving_gpus(each["captioner_72b"]) + serving_gpus(each["prism_reader"]), "gpu_hours": write + read,
        "disk_gb": captions * (policies + 2) * 8e-6,
        "details": (
            f"captions {write:,.0f} = 2 x ({policies} trained 3B + 7B + 72B) x {captions:,} captions x "
            f"{IMAGE_TOKENS + CAPTION_TOKENS} tokens / ({gpus.PEAK_FLOPS:.3g} x {gpus.GENERATE_USE})",
            f"answers {read:,.0f} = 2 x {each['prism_reader']:.3g} x {reads:,} tokens / "
            f"({gpus.PEAK_FLOPS:.3g} x {gpus.READ_USE})",
        ),
    }  # fmt: skip


_COUNTS: Mapping = {
    "01_qa_curation": _curation, "03_caprl_rl_training": _training, "04_llamafactory_pretraining": _pretraining,
    "05_prism_evaluation": _prism,
}  # fmt: skip


def _shown(value: float | int | str | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,.3g}" if isinstance(value, float) else str(value)
