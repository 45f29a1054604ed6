"""A training: one that stops and goes on equals one that did not stop; what is missing is told and teaches nothing."""

import copy
import json
import math
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForImageTextToText, TrainerCallback
from trl import GRPOTrainer

from caprl_utils.errors import UserError
from caprl_utils.rl.grpo import StepSampler
from caprl_utils.rl.monitor import Monitor, curve_row
from caprl_utils.rl.policy import WHOLE, counts, is_whole, save_final
from caprl_utils.runs import last_checkpoint
from caprl_utils.schema import Lora, ModelConfig
from tests.rl.conftest import open_small

SAME = ("loss", "grad_norm", "kl", "reward", "group_std", "completion_tokens", "entropy", "learning_rate")


class Training:
    """One run folder; `fit` goes on from what is there, as caprl_utils.rl.train does. more: of `open_small`."""

    def __init__(self, world: Path, folder: Path, **more):
        self.folder, self.open = folder, partial(open_small, world, folder, **more)

    def fit(self, stop_after: int | None = None, fails=None) -> bool:
        """stop_after: the step at which a stop is asked for, as by SIGTERM. fails: see `Failing`."""
        checkpoint, self.trainer = last_checkpoint(self.folder, is_whole), self.open()
        if fails is not None:
            models = self.trainer.reward_funcs[0].models
            models["qa"] = Failing(models["qa"], partial(fails, self.trainer))
        with Monitor(self.trainer, self.folder, checkpoint) as monitor:

            class Stop(TrainerCallback):
                def on_step_begin(self, args, state, control, **unused):
                    monitor.stopping = monitor.stopping or state.global_step + 1 == stop_after

            self.trainer.add_callback(Stop())
            return self.trainer.fit(checkpoint)

    curve = property(lambda self: self.rows("curve"))

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.trainer.model.named_parameters()}


class Failing:
    """A reader that fails on some requests."""

    words = "short"

    def __init__(self, inner, fails):
        self.inner, self.fails = inner, fails

    def letter_logprobs(self, requests, letters):
        rows = self.inner.letter_logprobs(requests, letters)
        return [None if self.fails(r) else row for r, row in zip(requests, rows, strict=True)]


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("caprl_utils.paths.RUNS", world / "runs")
        training = Training(world, tmp_path_factory.mktemp("whole"))
        assert training.fit()
        return training


def assert_same(a: Training, b: Training) -> None:
    assert [row["step"] for row in b.curve] == [1, 2, 3]
    for one, other in zip(a.curve, b.curve, strict=True):
        for name in SAME:
            assert other[name] == pytest.approx(one[name], abs=1e-5), (one["step"], name)
    torch.testing.assert_close(a.weights, b.weights, atol=1e-5, rtol=0)


def test_a_killed_training_goes_on_from_the_last_whole_checkpoint(world, runs, uninterrupted, tmp_path):
    """What kill -9 leaves: rows beyond the checkpoint, a torn row, a half-written checkpoint."""
    training = Training(world, tmp_path / "run")
    shutil.copytree(uninterrupted.folder, training.folder, dirs_exist_ok=True)
    (training.folder / "checkpoint-3" / WHOLE).unlink()
    shutil.copytree(training.folder / "checkpoint-3", training.folder / "checkpoint-10")
    with open(training.folder / "curve.jsonl", "a") as curve:
        curve.write('{"id": "4", "st')
    assert last_checkpoint(training.folder, is_whole).name == "checkpoint-2"
    assert training.fit() is True
    assert_same(uninterrupted, training)
    assert training.curve[-1]["kl"] > 1e-3  # a reference loaded from the checkpoint would give 0


@pytest.mark.integration
def test_stopped_in_between_and_resumed_equals_uninterrupted(world, models, runs, tmp_path):
    """After step 1, before a regular checkpoint. As on a GPU adapters alone train, and a step's captions go through in
    several passes; the final folder needs no PEFT to load.
    """
    parts = {"micro_batch_size": 2, "lora": Lora(rank=4, alpha=8), "vision_tower": False}
    whole, resumed = (Training(world, tmp_path / name, **parts) for name in ("whole", "resumed"))
    assert whole.fit()
    assert resumed.fit(stop_after=1) is False
    assert resumed.fit()
    assert_same(whole, resumed)
    assert whole.curve[-1]["kl"] > 0 and whole.trainer.args.gradient_accumulation_steps == 4
    model = whole.trainer.model
    assert counts(model)["vision_tower"]["trainable"] == 0 < counts(model)["language_model"]["trainable"]
    start = ModelConfig(path=str(models["policy"]))
    save_final(model, whole.trainer.processing_class, tmp_path / "final", start)
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(report.values())
    base = AutoModelForImageTextToText.from_pretrained(start.path)
    changed = [n for n, p in loaded.named_parameters() if not torch.equal(p, base.get_parameter(n))]
    assert any("language_model" in n for n in changed) and not any("visual.blocks" in n for n in changed)


def test_trls_own_loading_loads_nothing_and_ours_refuses_what_does_not_fit(opened, uninterrupted, tmp_path):
    """The reason for our override. When the first part fails, TRL and transformers were mended and it can go."""
    trainer = opened()
    checkpoint = uninterrupted.folder / "checkpoint-3"
    before = copy.deepcopy(trainer.model.model.state_dict())
    GRPOTrainer._load_from_checkpoint(trainer, str(checkpoint))
    torch.testing.assert_close(dict(trainer.model.model.state_dict()), dict(before), atol=0, rtol=0)

    trainer._load_from_checkpoint(str(checkpoint))
    weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
    torch.testing.assert_close(weights, uninterrupted.weights, atol=0, rtol=0)
    assert not torch.equal(trainer.ref_model.lm_head.weight, trainer.model.lm_head.weight)

    folder = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    weights.popitem()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="checkpoint-1 does not fit the model"):
        trainer._load_from_checkpoint(str(folder))


@pytest.mark.integration
def test_dead_reader_stops_training_and_teaches_nothing(world, runs, uninterrupted, tmp_path):
    """When the reader is back, the run goes on from the last checkpoint and equals any other."""
    training = Training(world, tmp_path / "run")
    with pytest.raises(UserError, match=r"8 of 8 captions.*Nothing was learned"):
        training.fit(fails=lambda trainer, request: trainer.state.global_step >= 2)
    assert len(training.curve) == 2 and last_checkpoint(training.folder, is_whole).name == "checkpoint-2"
    assert training.fit()
    assert_same(uninterrupted, training)


@pytest.mark.integration
def test_a_reward_that_is_missing_is_left_out_of_its_group(world, runs, tmp_path):
    """The reader fails on every question about some captions: no reward, no zero, no part in the gradient."""
    training = Training(world, tmp_path / "run", rl={"max_failed_share": 0.5})

    def fails(trainer, request):  # captions 0 and 3: the number behind the image in the request's name
        return "image-0" in request.id and request.id.split("/")[3] in ("0", "3")

    training.fit(stop_after=1, fails=fails)
    rows = training.rows("samples")
    missing = [row["advantage"] for row in rows if row["reward"] is None]
    assert missing == [0] * 4  # of two captions of four images each
    assert training.curve[0]["failed_share"] == 0.5
    known = [row["reward"] for row in rows if row["reward"] is not None]
    assert training.curve[0]["reward"] == pytest.approx(sum(known) / len(known), abs=1e-6)


def test_curve_and_samples(uninterrupted):
    rows = uninterrupted.rows("samples")
    assert len(rows) == 3 * 8 and {row["image_id"][:6] for row in rows} == {"image-"}
    first = [row for row in rows if row["step"] == 1]
    mean = sum(row["reward"] for row in first) / len(first)
    assert mean == pytest.approx(uninterrupted.curve[0]["reward"], abs=1e-6)
    pairs = [(a["reward"], b["reward"]) for a, b in zip(first[::2], first[1::2], strict=True)]
    spread = sum(abs(a - b) / math.sqrt(2) for a, b in pairs) / len(pairs)
    assert spread == pytest.approx(uninterrupted.curve[0]["group_std"], abs=1e-6)
    assert uninterrupted.curve[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert uninterrupted.curve[0]["unparsed"] is None
    board = EventAccumulator(str(uninterrupted.folder / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/reward")] == [1, 2, 3]
    assert board.Scalars("train/kl")[-1].value == pytest.approx(uninterrupted.curve[-1]["kl"], rel=1e-5)
    shown = board.Tensors("caption 0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert shown == f"{first[0]['reward']}: {first[0]['caption']}"


def test_spread_by_hand_and_what_is_missing_is_none():
    # image 1: 0, 1 -> std 0.7071; image 2: one known reward -> none; image 3: equal -> 0
    row = curve_row(7, {"reward": 0.5, "kl": math.nan, "loss": None}, [[0.0, 1.0], [0.5, math.nan], [0.3, 0.3]])
    assert row["id"] == "7" and row["reward"] == 0.5 and row["group_std"] == pytest.approx(math.sqrt(0.5) / 2)
    assert [row[name] for name in ("kl", "loss", "unparsed")] == [None] * 3
    assert curve_row(7, {}, [[math.nan, math.nan]])["group_std"] is None


@pytest.fixture
def listening():
    """A stand-in for a trainer; `heard` has the names of its callbacks."""
    heard: list[str] = []
    return SimpleNamespace(
        accelerator=SimpleNamespace(is_main_process=True), args=SimpleNamespace(max_steps=4), heard=heard,
        add_callback=lambda callback: heard.append(getattr(callback, "__name__", type(callback).__name__)),
    )  # fmt: skip


@pytest.mark.parametrize("logs", [{"loss": math.nan, "grad_norm": 1.0}, {"loss": 0.1, "grad_norm": math.inf}])
def test_nan_stops_with_step_and_remedy(logs, listening, tmp_path):
    match = r"not finite at step 3.*rl\.learning_rate"
    with Monitor(listening, tmp_path, None) as monitor, pytest.raises(UserError, match=match):
        monitor.on_log(None, SimpleNamespace(global_step=3), None, logs)
    assert len(monitor.curve) == 0


def test_a_tracker_listens_beside_tensorboard(listening, tmp_path, monkeypatch):
    package = tmp_path / "site" / "trackio"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(package.parent)
    with Monitor(listening, tmp_path / "caprl-seed0", None, "trackio"):
        pass
    assert listening.heard == ["TensorBoardCallback", "TrackioCallback", "Monitor"]
    assert listening.args.run_name == "caprl-seed0"


def test_data_order_covers_all_images_and_depends_on_the_step_alone():
    def steps(count: int, repeats: int, seed: int) -> list[list[int]]:
        rows = list(StepSampler(7, count, prompts=4, group=2, repeats=repeats, seed=seed))
        assert len(rows) == 8 * count * repeats
        return [rows[i : i + 8 * repeats] for i in range(0, len(rows), 8 * repeats)]

    found = steps(9, 3, seed=5)
    assert all(rows == rows[:8] * 3 and rows[:8:2] == rows[1:8:2] for rows in found)
    images = [row for rows in found for row in rows[:8:2]]
    for start in range(0, 35, 7):  # five whole passes
        assert sorted(images[start : start + 7]) == list(range(7))
    assert images[:7] != images[7:14] and steps(9, 1, seed=6)[0] != found[0][:8]
    assert [rows[:8] for rows in found] == steps(20, 1, seed=5)[:9]
