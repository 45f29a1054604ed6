"""What a training shows while it runs: curve.jsonl, samples.jsonl, TensorBoard, progress; and when it has to stop."""

from __future__ import annotations

import json
import math
import signal
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic
from caprl_utils.paths import shown
from caprl_utils.progress import Progress
from caprl_utils.rl.grpo import CaptionTrainer
from caprl_utils.runs import RowStore, step_of

SAMPLES_PER_STEP = 8
COLUMNS = [  # of curve.jsonl
    "reward", "reward_std", "completion_tokens", "clipped_share", "kl", "zero_variance_share", "entropy", "loss",
    "grad_norm", "learning_rate", "failed_share", "repetition", "letter_mass", "fallback", "unparsed",
    "cannot_answer", "score_mass", "verifier_mass", "reward_calls", "logp_gap", "seconds",
    "seconds_generate", "seconds_reward",
]  # fmt: skip
LOGGED = {  # TRL's or our trainer's name of a column, where it is another
    "completion_tokens": "completions/mean_length", "clipped_share": "completions/clipped_ratio",
    "logp_gap": "sampling/sampling_logp_difference/mean",  # of vLLM's and the trainer's log-probabilities of a token
    "zero_variance_share": "frac_reward_zero_std", "seconds": "step_time",
    "seconds_generate": "seconds/generate", "seconds_reward": "seconds/reward",
}  # fmt: skip


def curve_row(step: int, logs: dict[str, Any], rewards: list[list[float]]) -> dict[str, Any]:
    """One row of curve.jsonl: what is missing is None. rewards: one list per image, NaN where there is none. group_std:
    mean over images of the standard deviation (n - 1) among an image's captions, the spread GRPO learns from.
    """
    groups = [[r for r in group if not math.isnan(r)] for group in rewards]
    spreads = [statistics.stdev(known) for known in groups if len(known) > 1]
    row = {name: _finite(logs.get(LOGGED.get(name, name))) for name in COLUMNS}
    return {"id": str(step), "step": step, **row, "group_std": statistics.fmean(spreads) if spreads else None}


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


class Monitor(TrainerCallback, ExitStack):
    """Writes a row per step; stops on a signal (after saving) or a NaN (before saving). Leaving it closes its files."""

    def __init__(self, trainer: CaptionTrainer, folder: Path, checkpoint: Path | None, tracker: str | None = None):
        """Start to listen to a trainer that goes on from a checkpoint, and to SIGTERM. tracker: `rl.report_to`."""
        super().__init__()
        self.folder, self.stopping, self.trainer = folder, False, trainer
        self.writes = trainer.accelerator.is_main_process  # one of the processes that train together
        if self.writes:
            start, files = step_of(checkpoint) if checkpoint else 0, []
            for file in (folder / "curve.jsonl", folder / "samples.jsonl"):
                if file.is_file():  # steps beyond the checkpoint are made again
                    kept = [row for row in RowStore(file).read() if row["step"] <= start]
                    write_atomic(file, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in kept))
                files.append(self.enter_context(RowStore(file)))
            self.curve, self.samples = files
            self.board = self.enter_context(SummaryWriter(folder / "tensorboard", purge_step=start + 1))
            trainer.add_callback(TensorBoardCallback(self.board))
            trainer.args.run_name = folder.name  # a tracker's name of the run
            for callback in get_reporting_integration_callbacks(tracker):
                trainer.add_callback(callback)
            self.progress = self.enter_context(Progress("train", total=trainer.args.max_steps))
            self.progress.update(start)
        trainer.add_callback(self)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopping", True))

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Save and stop when asked to: all processes at one step, though each hears the signal at its own time."""
        if any(gather_object([self.stopping])):
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **unused: Any) -> None:
        """Write the step's rows."""
        if "loss" not in logs:  # the summary at the end has none
            return
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(logs.get(name, 0.0))]
        if bad:  # in every process: loss and norm are those of all
            raise UserError(
                f"{' and '.join(bad)} not finite at step {state.global_step}; nothing of this step was saved in "
                f"{shown(self.folder)}. Lower rl.learning_rate, or look at samples.jsonl for broken captions."
            )
        if not self.writes:
            return
        kept, size = self.trainer._logs, self.trainer.num_generations
        rewards = list(kept["rewards"][self.trainer.reward_func_names[0]])
        row = curve_row(state.global_step, logs, [rewards[i : i + size] for i in range(0, len(rewards), size)])
        self.curve.append(row)
        for number, reward in enumerate(rewards[:SAMPLES_PER_STEP]):
            sample = {
                "id": f"{state.global_step}/{number}", "step": state.global_step,
                "image_id": kept["extra"]["image_id"][number], "caption": kept["completion"][number][0]["content"],
                "num_tokens": kept["extra"]["num_tokens"][number],
                "reward": _finite(reward), "advantage": _finite(kept["advantages"][number]),
            }  # fmt: skip
            self.samples.append(sample)
            self.board.add_text(f"caption {number}", "{reward}: {caption}".format(**sample), state.global_step)
        note = f"reward {row['reward']:.3f}" if row["reward"] is not None else "no reward"
        self.progress.update(1, note=f"{note}, {row['completion_tokens'] or 0:.0f} tokens")
