"""What a training shows while it runs: curve.jsonl, samples.jsonl, TensorBoard files, the progress file; and when it
has to stop.
"""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic
from caprl_utils.paths import shown
from caprl_utils.progress import Progress
from caprl_utils.rl.live import captions_table
from caprl_utils.runs import RowStore

if TYPE_CHECKING:
    from caprl_utils.rl.trainer import CaptionTrainer

SAMPLES_PER_STEP = 8
COLUMNS = {  # our names -> TRL's, and those our reward logs
    "reward": "reward",
    "reward_std": "reward_std",
    "completion_tokens": "completions/mean_length",
    "clipped_share": "completions/clipped_ratio",
    "kl": "kl",
    "zero_variance_share": "frac_reward_zero_std",
    "entropy": "entropy",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "failed_share": "failed_share",
    "repetition": "repetition",
    "letter_mass": "letter_mass",
    "fallback": "fallback",
    "unparsed": "unparsed",
    "cannot_answer": "cannot_answer",
    "score_mass": "score_mass",
    "seconds": "step_time",
    "seconds_generate": "seconds/generate",
    "seconds_reward": "seconds/reward",
}


def curve_row(step: int, logs: dict[str, Any], rewards: list[list[float]]) -> dict[str, Any]:
    """One row of curve.jsonl: what is missing is None. `rewards`: one list per image, NaN where there is
    none.
    """
    row = {name: _finite(logs.get(key)) for name, key in COLUMNS.items()}
    return {"id": str(step), "step": step, **row, "group_std": group_std(rewards)}


def group_std(rewards: list[list[float]]) -> float | None:
    """Mean over images of the standard deviation (n - 1) among an image's captions: the spread GRPO learns
    from.
    """
    spreads = []
    for group in rewards:
        known = [r for r in group if not math.isnan(r)]
        if len(known) > 1:
            mean = sum(known) / len(known)
            spreads.append(math.sqrt(sum((r - mean) ** 2 for r in known) / (len(known) - 1)))
    return sum(spreads) / len(spreads) if spreads else None


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def cut_after(file: Path, step: int) -> None:
    """Drop the rows of steps beyond `step`: a training that goes on from its checkpoint makes them again."""
    if not file.is_file():
        return
    kept = [
        line for line in file.read_text(encoding="utf-8").splitlines() if _step_of(line, step + 1) <= step
    ]
    write_atomic(file, "".join(f"{line}\n" for line in kept))


def _step_of(line: str, otherwise: int) -> int:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the last line of a killed process
        return otherwise


class Monitor(TrainerCallback):
    """Writes a row per step and stops the training on a signal (after saving) or a NaN (before saving)."""

    def __init__(self, folder: Path, total_steps: int, start_step: int, writes: bool = True):
        """writes: whether this is the process of several that writes the files."""
        self.folder, self.stopping, self.trainer, self.writes = folder, False, None, writes
        if not writes:
            return
        for name in ("curve", "samples"):
            cut_after(folder / f"{name}.jsonl", start_step)
        self.board = SummaryWriter(folder / "tensorboard", purge_step=start_step + 1)
        self.curve = RowStore(folder / "curve.jsonl")
        self.samples = RowStore(folder / "samples.jsonl")
        self.progress = Progress("train", total=total_steps)
        self.progress.update(start_step)

    def attach(self, trainer: CaptionTrainer) -> None:
        """Start listening to a trainer, and to SIGTERM."""
        self.trainer = trainer
        trainer.add_callback(self)
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.stopping = True

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Save and stop when asked to: all processes at one step, though each hears the signal at its own time."""
        if any_process(self.stopping):
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **unused: Any) -> None:
        """Write the step's rows."""
        if "loss" not in logs:  # the summary at the end has none
            return
        self._refuse_nan(state.global_step, logs)  # in every process: loss and norm are those of all
        if not self.writes:
            return
        kept = self.trainer._logs
        rewards = list(kept["rewards"][self.trainer.reward_func_names[0]])
        size = self.trainer.num_generations
        groups = [rewards[i : i + size] for i in range(0, len(rewards), size)]
        row = curve_row(state.global_step, logs, groups)
        self.curve.append(row)
        samples = [
            self._sample(state.global_step, number, kept, rewards)
            for number in range(min(SAMPLES_PER_STEP, len(rewards)))
        ]
        for sample in samples:
            self.samples.append(sample)
        self._board(row, samples)
        note = f"reward {row['reward']:.3f}" if row["reward"] is not None else "no reward"
        self.progress.update(1, note=f"{note}, {row['completion_tokens'] or 0:.0f} tokens")

    def _board(self, row: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """The same for TensorBoard."""
        for name in (*COLUMNS, "group_std"):
            if row[name] is not None:
                self.board.add_scalar(name, row[name], row["step"])
        self.board.add_text("captions", captions_table(samples), row["step"])

    def _sample(self, step: int, number: int, kept: Any, rewards: list[float]) -> dict[str, Any]:
        return {
            "id": f"{step}/{number}", "step": step, "image_id": kept["extra"]["image_id"][number],
            "caption": _text(kept["completion"][number]), "num_tokens": kept["extra"]["num_tokens"][number],
            "reward": _finite(rewards[number]), "advantage": _finite(kept["advantages"][number]),
        }  # fmt: skip

    def _refuse_nan(self, step: int, logs: dict[str, Any]) -> None:
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(logs.get(name, 0.0))]
        if bad:
            raise UserError(
                f"{' and '.join(bad)} not finite at step {step}; nothing of this step was saved in "
                f"{shown(self.folder)}. Lower rl.learning_rate, or look at samples.jsonl for broken captions."
            )

    def close(self) -> None:
        """Flush the files."""
        if not self.writes:
            return
        self.curve.close()
        self.samples.close()
        self.board.close()
        self.progress.close()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any of the processes that train together."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    return any(gather_object([flag])) if PartialState().num_processes > 1 else flag


def _text(completion: Any) -> str:
    content = completion[0]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
