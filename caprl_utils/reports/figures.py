"""The figures: training curves, and scores as dots with intervals."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from caprl_utils.errors import UserError
from caprl_utils.paths import shown
from caprl_utils.reports import style
from caprl_utils.reports.tables import record_path

SMOOTH_STEPS = (
    9  # ours: steps averaged by the heavy line, as many before as after; the thin one is every step
)
_NEAR_LIMIT = 0.5  # ours: a caption limit is drawn when a caption of any step comes that near to it


@dataclass(frozen=True)
class Curve:
    """One training: what was measured at each step."""

    label: str
    steps: Sequence[int]
    rewards: Sequence[float]
    lengths: Sequence[float]  # tokens per caption
    file: str = ""  # record_path of its curve.jsonl


@dataclass(frozen=True)
class Dots:
    """One model: value and interval per group, None where there is none."""

    label: str
    values: Sequence[float | None]
    intervals: Sequence[tuple[float, float] | None]


def read_curve(run_folder: Path, label: str) -> Curve:
    """The curve.jsonl of a training run; steps without a reward are left out. Raises UserError without
    any.
    """
    file = run_folder / "curve.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = [row for row in map(json.loads, lines) if row["reward"] is not None]
    if not rows:
        raise UserError(f"no training curve in {shown(file)}; make it: make 03_caprl_rl_training")
    rows.sort(key=lambda row: row["step"])
    columns = ([row[key] for row in rows] for key in ("step", "reward", "completion_tokens"))
    return Curve(label, *columns, record_path(file))


def centred_mean(values: Sequence[float], width: int = SMOOTH_STEPS) -> list[float]:
    """Mean of `width` (odd) values around each place; fewer at both ends."""
    half = width // 2
    windows = [values[max(0, place - half) : place + half + 1] for place in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def plot_curves(curves: Sequence[Curve], stem: Path, limit: int | None = None, note: str = "") -> list[Path]:
    """Reward and caption length over training steps (as the paper's Figure 1c); writes PNG and SVG.

    limit: tokens at which the training cuts a caption. note: small line below.
    """
    with style.styled():
        figure, (left, right) = style.new_figure(2, height_inches=2.9)
        for curve, look in zip(curves, style.looks([curve.label for curve in curves]), strict=True):
            for axes, values in ((left, curve.rewards), (right, curve.lengths)):
                axes.plot(curve.steps, values, color=look.colour, alpha=0.25, linewidth=0.8)
                axes.plot(
                    curve.steps, centred_mean(values), color=look.colour, linestyle=look.line,
                    linewidth=look.width, zorder=look.layer, label=curve.label,
                )  # fmt: skip
        step = f"training step (heavy: centred mean of {SMOOTH_STEPS})"
        left.set(
            title="Reward", xlabel=step, ylim=(0, 1.03)
        )  # a full reward is seen, not hidden by the frame
        right.set(title="Caption length (tokens)", xlabel=step)
        if limit is not None and max(max(curve.lengths) for curve in curves) > _NEAR_LIMIT * limit:
            right.axhline(limit, color="#444444", linestyle=":", linewidth=1.2)
            place = {"xycoords": ("axes fraction", "data"), "va": "bottom", "fontsize": 7}
            right.annotate(f"cut at {limit}", (0.01, limit), **place)
        right.set_ylim(bottom=0)
        if len(curves) > 1:
            figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2)
        style.note(figure, note)
        return style.save(figure, stem)


def plot_dots(models: Sequence[Dots], groups: Sequence[str], stem: Path, note: str = "") -> list[Path]:
    """Accuracy per benchmark, one row each, models side by side with their intervals; writes PNG and SVG.

    note: small line below.
    """
    with style.styled():
        rows = len(groups)
        figure, (axes,) = style.new_figure(1, height_inches=1.2 + rows * (0.11 * len(models) + 0.17))
        spread = 0.7 / max(1, len(models))
        looks = style.looks([model.label for model in models])
        for number, (model, look) in enumerate(zip(models, looks, strict=True)):
            offset = (number - (len(models) - 1) / 2) * spread
            places = [rows - 1 - i - offset for i, v in enumerate(model.values) if v is not None]
            values = [100 * v for v in model.values if v is not None]
            for place, bounds in zip(places, [b for v, b in zip(model.values, model.intervals, strict=True)
                                              if v is not None], strict=True):  # fmt: skip
                if bounds is not None:
                    axes.plot([100 * b for b in bounds], [place, place], color=look.colour, linewidth=1.2)
            axes.plot(
                values,
                places,
                linestyle="none",
                marker=look.marker,
                color=look.colour,
                markersize=6 if look.strong else 4.5,
                label=model.label,
                clip_on=False,
            )
        axes.set(yticks=range(rows), yticklabels=list(reversed(groups)), xlim=(0, 100))
        axes.set(xlabel="accuracy (%), 95 % interval", ylim=(-0.5, rows - 0.5))
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        for place in range(0, rows, 2):
            axes.axhspan(place - 0.5, place + 0.5, color="#f3f3f3", zorder=0)
        axes.legend(
            loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, columnspacing=1.2, handletextpad=0.2
        )
        style.note(figure, note)
        return style.save(figure, stem)
