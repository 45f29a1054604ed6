import json
import math
from types import SimpleNamespace

import pytest

from caprl_utils.errors import UserError
from caprl_utils.rl import policy
from caprl_utils.rl.grpo import StepSampler
from caprl_utils.rl.monitor import Monitor, curve_row, cut_after, group_std
from caprl_utils.runs import checkpoints_in


def test_group_spread_by_hand():
    # image 1: 0, 1 -> std 0.7071; image 2: one known reward -> none; image 3: equal -> 0
    assert group_std([[0.0, 1.0], [0.5, math.nan], [0.3, 0.3]]) == pytest.approx(math.sqrt(0.5) / 2)
    assert group_std([[math.nan, math.nan]]) is None


def test_missing_values_are_none():
    row = curve_row(7, {"reward": 0.5, "kl": math.nan, "loss": None}, [])
    assert row["id"] == "7" and row["reward"] == 0.5
    assert row["kl"] is None and row["loss"] is None and row["unparsed"] is None and row["group_std"] is None


def test_rows_beyond_the_checkpoint_are_cut(tmp_path):
    file = tmp_path / "curve.jsonl"
    file.write_text(
        "".join(json.dumps({"id": str(i), "step": i}) + "\n" for i in (1, 2, 3)) + '{"id": "4", "st'
    )
    cut_after(file, 2)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]
    cut_after(tmp_path / "absent.jsonl", 2)


@pytest.mark.parametrize("logs", [{"loss": math.nan, "grad_norm": 1.0}, {"loss": 0.1, "grad_norm": math.inf}])
def test_nan_stops_with_step_and_remedy(logs, tmp_path):
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(is_main_process=True), args=SimpleNamespace(max_steps=4),
        add_callback=lambda callback: None,
    )  # fmt: skip
    with (
        Monitor(trainer, tmp_path, None) as monitor,
        pytest.raises(UserError, match=r"not finite at step 3.*rl\.learning_rate"),
    ):
        monitor.on_log(None, SimpleNamespace(global_step=3), None, logs)
    assert monitor.curve.done_ids() == set()


def test_half_written_checkpoints_go(tmp_path):
    for step in (2, 10, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"x")
    (tmp_path / "checkpoint-notes").mkdir()
    for step in (2, 4):
        policy.mark_complete(tmp_path / f"checkpoint-{step}")
    assert policy.last_complete(tmp_path) == tmp_path / "checkpoint-4"
    assert [p.name for p in checkpoints_in(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


def test_data_order_covers_all_images_and_depends_on_the_step_alone():
    sampler = StepSampler(num_rows=7, steps=9, prompts=4, group=2, repeats=3, seed=5)
    rows = list(sampler)
    assert len(rows) == len(sampler) == 9 * 4 * 2 * 3
    images = [row for step in range(9) for row in sampler.images_of(step)]
    for start in range(0, 35, 7):  # five whole passes
        assert sorted(images[start : start + 7]) == list(range(7))
    assert images[:7] != images[7:14]
    first = [row for row in images[:4] for _ in range(2)]
    assert rows[:8] == rows[8:16] == rows[16:24] == first
    longer = StepSampler(num_rows=7, steps=20, prompts=4, group=2, repeats=1, seed=5)
    assert [longer.images_of(step) for step in range(9)] == [sampler.images_of(step) for step in range(9)]
    assert StepSampler(7, 9, 4, 2, 3, seed=6).images_of(0) != sampler.images_of(0)
