"""A training that stops and goes on equals one that did not stop."""

import json
import math
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trl import GRPOTrainer

from caprl_utils.config import load_experiment
from caprl_utils.errors import UserError
from caprl_utils.models import endpoint
from caprl_utils.models.endpoint import EndpointBackend
from caprl_utils.rl.grpo import RewardsFailedError, open_trainer
from caprl_utils.rl.monitor import Monitor
from caprl_utils.rl.policy import COMPLETE, last_complete
from caprl_utils.rl.readers import ListedPrompts, Reader
from caprl_utils.schema import ModelConfig
from tests.rl.conftest import STEPS
from tests.rl.vllm_stub import Server

SAME = ("loss", "grad_norm", "kl", "reward", "group_std", "completion_tokens", "entropy", "learning_rate")


class Training:
    """One run folder; `fit` goes on from what is there, as caprl_utils.rl.train does."""

    def __init__(self, world: Path, folder: Path, overrides: str = ""):
        self.experiment, self.profile = load_experiment(str(world / "small.yaml"), str(world / "tiny.yaml"))
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def fit(self, stop_after: int | None = None, reader=None) -> bool:
        checkpoint = last_complete(self.folder)
        self.trainer = open_trainer(self.experiment, self.profile, 0, self.folder)
        if reader is not None:
            self.trainer.reward_funcs[0].score.reader = reader(self.trainer)
        with Monitor(self.trainer, self.folder, checkpoint) as monitor:
            if stop_after is not None:
                self.trainer.add_callback(stop_after_step(monitor, stop_after))
            return self.trainer.fit(checkpoint)

    @property
    def curve(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "curve.jsonl").read_text().splitlines()]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.trainer.model.named_parameters()}


def stop_after_step(monitor, step):
    """Asks for a stop as SIGTERM does."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **unused):
            monitor.stopping = monitor.stopping or state.global_step + 1 >= step

    return Stop()


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("caprl_utils.paths.RUNS", world / "runs")
        training = Training(world, tmp_path_factory.mktemp("whole"))
        assert training.fit()
        return training


def assert_same(a: Training, b: Training) -> None:
    assert [row["step"] for row in b.curve] == [1, 2, 3, 4]
    for one, other in zip(a.curve, b.curve, strict=True):
        for name in SAME:
            assert other[name] == pytest.approx(one[name], abs=1e-5), (one["step"], name)
    for name, weight in a.weights.items():
        torch.testing.assert_close(b.weights[name], weight, atol=1e-5, rtol=0)


def test_resumed_equals_uninterrupted(world, runs, uninterrupted, tmp_path):
    """Stopped after step 3 (between two regular checkpoints), then on to step 4: KL reference included."""
    training = Training(world, tmp_path / "run")
    assert training.fit(stop_after=3) is False
    assert training.fit() is True
    assert_same(uninterrupted, training)
    assert training.curve[-1]["kl"] > 1e-3  # a reference loaded from the checkpoint would give 0


@pytest.mark.integration
def test_resumed_equals_uninterrupted_with_accumulated_gradients(world, runs, tmp_path):
    """As on a GPU: a step's captions in several passes."""
    trainings = [Training(world, tmp_path / name) for name in ("whole", "resumed")]
    for training in trainings:
        parts = training.experiment.training.model_copy(update={"micro_batch_size": 2})
        training.experiment = training.experiment.model_copy(update={"training": parts})
    assert trainings[0].fit()
    assert trainings[1].fit(stop_after=3) is False
    assert trainings[1].fit()
    assert_same(*trainings)
    assert trainings[0].trainer.args.gradient_accumulation_steps == 4


@pytest.mark.integration
def test_killed_training_goes_on_from_the_last_whole_checkpoint(world, runs, uninterrupted, tmp_path):
    """What kill -9 leaves: rows beyond the checkpoint, a torn row, a half-written checkpoint."""
    training = Training(world, tmp_path / "run")
    training.fit(stop_after=3)
    (training.folder / "checkpoint-3" / COMPLETE).unlink()
    with open(training.folder / "curve.jsonl", "a") as curve:
        curve.write('{"id": "4", "st')
    assert training.fit()
    assert_same(uninterrupted, training)


def test_trls_own_loading_loads_nothing(world, runs, uninterrupted, tmp_path):
    """The reason for our override. When this fails, TRL and transformers were mended and it can go."""
    checkpoint = uninterrupted.folder / "checkpoint-4"
    training = Training(world, tmp_path / "run")
    trainer = open_trainer(training.experiment, training.profile, 0, training.folder)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    GRPOTrainer._load_from_checkpoint(trainer, str(checkpoint))
    body = {name: p for name, p in trainer.model.named_parameters() if name != "lm_head.weight"}
    assert all(torch.equal(p, before[name]) for name, p in body.items())

    trainer._load_from_checkpoint(str(checkpoint))
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, uninterrupted.weights[name], atol=0, rtol=0)
    assert not torch.equal(trainer.ref_model.lm_head.weight, trainer.model.lm_head.weight)


def test_checkpoint_that_does_not_fit_is_refused(world, runs, uninterrupted, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    for file in (uninterrupted.folder / "checkpoint-4").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights.popitem()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    training = Training(world, tmp_path / "run")
    trainer = open_trainer(training.experiment, training.profile, 0, training.folder)
    with pytest.raises(UserError, match="checkpoint-1 does not fit the model"):
        trainer._load_from_checkpoint(str(folder))


def dying(at_step: int):
    """A reader that fails on everything from a step on."""

    def wrap(trainer):
        real = trainer.reward_funcs[0].score.reader

        class Dying:
            def letter_logprobs(self, requests, letters):
                if trainer.state.global_step >= at_step:
                    return [None] * len(requests)
                return real.letter_logprobs(requests, letters)

        return Dying()

    return wrap


@pytest.mark.integration
def test_dead_reader_stops_training_and_teaches_nothing(world, runs, uninterrupted, tmp_path):
    """It stops with a checkpoint of the last finished step; when it is back, the run equals any other."""
    training = Training(world, tmp_path / "run")
    with pytest.raises(RewardsFailedError, match=r"8 of 8 captions.*step 3 is saved in .*checkpoint-3"):
        training.fit(reader=dying(3))
    assert len(training.curve) == 3
    assert training.fit()
    assert_same(uninterrupted, training)


def served(world: Path, folder: Path, server: Server, at_step: int, then) -> tuple:
    """A training whose reader is a server, which goes away after a step; `then` is called when it has."""
    from transformers import TrainerCallback

    training = Training(world, folder)
    config = ModelConfig(path="m", backend="endpoint", base_urls=[server.url])

    class Away(TrainerCallback):
        def on_step_end(self, args, state, control, **unused):
            if state.global_step == at_step:
                server.stop()
                then()

    def reader(trainer):
        trainer.add_callback(Away())
        backend = EndpointBackend(config)
        return Reader(backend, ListedPrompts(backend))

    return training, reader


@pytest.mark.integration
def test_a_server_that_dies_for_good_stops_training_with_a_checkpoint(world, runs, tmp_path, quick_client):
    with Server() as server:
        training, reader = served(world, tmp_path / "run", server, 2, lambda: None)
        with pytest.raises(
            RewardsFailedError, match=r"(?s)8 of 8 captions.*step 2 is saved in .*checkpoint-2"
        ):
            training.fit(reader=reader)
        assert last_complete(training.folder).name == "checkpoint-2"
        assert [row["failed_share"] for row in training.curve] == [0, 0]
        server.start()
        assert training.fit(reader=lambda trainer: reader(trainer))
    assert [row["step"] for row in training.curve] == [1, 2, 3, 4]


@pytest.mark.integration
def test_a_server_that_comes_back_is_waited_for(world, runs, tmp_path, caplog, quick_client, monkeypatch):
    """It is away in the middle until the client says so: no step without rewards, and the curve of one that stayed."""

    def back_when_missed(server: Server) -> None:
        while "waiting up to 60 s" not in caplog.text:
            time.sleep(0.05)
        server.start()

    curves = []
    monkeypatch.setattr(endpoint, "SILENT_SEC", 60.0)
    for away in (False, True):
        with Server() as server:
            later = threading.Thread(target=back_when_missed, args=(server,))
            training, reader = served(
                world,
                tmp_path / str(away),
                server,
                2 if away else STEPS,
                later.start if away else lambda: None,
            )
            assert training.fit(reader=reader)
            if not away:
                server.start()
        curves.append([(row["reward"], row["failed_share"], row["loss"]) for row in training.curve])
    assert curves[0] == [pytest.approx(row, abs=1e-5) for row in curves[1]]
    assert all(failed == 0 for _, failed, _ in curves[1])
    assert "waiting up to 60 s" in caplog.text


@pytest.mark.integration
def test_a_reward_that_is_missing_is_left_out_of_its_group(world, runs, tmp_path):
    """The reader fails on every question about some captions: no reward, no zero, no part in the gradient."""
    training = Training(world, tmp_path / "run")
    profile = training.profile
    training.profile = profile.model_copy(
        update={"rl": profile.rl.model_copy(update={"max_failed_share": 0.5})}
    )

    def wrap(trainer):
        real = trainer.reward_funcs[0].score.reader

        class Failing:
            def letter_logprobs(self, requests, letters):
                rows = real.letter_logprobs(requests, letters)
                failed = {
                    "0",
                    "3",
                }  # number of the caption within its group, behind the image in the request's name
                return [
                    None if r.id.split("/")[3] in failed and "image-0" in r.id else row
                    for r, row in zip(requests, rows, strict=True)
                ]

        return Failing()

    training.fit(stop_after=1, reader=wrap)
    rows = [json.loads(line) for line in (training.folder / "samples.jsonl").read_text().splitlines()]
    missing = [row for row in rows if row["reward"] is None]
    assert len(missing) == 4 and all(
        row["advantage"] == 0 for row in missing
    )  # one of two captions of four images
    assert training.curve[0]["failed_share"] == 0.5
    known = [row["reward"] for row in rows if row["reward"] is not None]
    assert training.curve[0]["reward"] == pytest.approx(sum(known) / len(known), abs=1e-6)


def test_curve_and_samples(uninterrupted):
    rows = [json.loads(line) for line in (uninterrupted.folder / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 8 and {row["image_id"][:6] for row in rows} == {"image-"}
    first = [row for row in rows if row["step"] == 1]
    mean = sum(row["reward"] for row in first) / len(first)
    assert mean == pytest.approx(uninterrupted.curve[0]["reward"], abs=1e-6)
    spread = [
        abs(a["reward"] - b["reward"]) / math.sqrt(2) for a, b in zip(first[::2], first[1::2], strict=True)
    ]
    assert sum(spread) / len(spread) == pytest.approx(uninterrupted.curve[0]["group_std"], abs=1e-6)
    assert uninterrupted.curve[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert uninterrupted.curve[0]["unparsed"] is None
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(uninterrupted.folder / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/reward")] == [1, 2, 3, 4]
    assert board.Scalars("train/kl")[-1].value == pytest.approx(uninterrupted.curve[-1]["kl"], rel=1e-5)
    shown = board.Tensors("caption 0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert shown == f"{first[0]['reward']}: {first[0]['caption']}"


@pytest.mark.integration
def test_lora_trains_resumes_and_ends_as_a_whole_model(world, runs, tmp_path):
    """Adapters alone train; a resumed run equals the whole one; the final folder needs no PEFT to load."""
    from caprl_utils.rl.policy import counts, save_final
    from caprl_utils.schema import Lora
    from caprl_utils.schema import Training as Parts

    trainings = [Training(world, tmp_path / name) for name in ("whole", "resumed")]
    for training in trainings:
        parts = Parts(lora=Lora(rank=4, alpha=8), vision_tower=False)
        training.experiment = training.experiment.model_copy(update={"training": parts})
    assert trainings[0].fit()
    assert trainings[1].fit(stop_after=3) is False
    assert trainings[1].fit()
    assert_same(*trainings)
    assert trainings[0].curve[-1]["kl"] > 0

    model = trainings[0].trainer.model
    assert counts(model)["vision_tower"]["trainable"] == 0 < counts(model)["language_model"]["trainable"]
    save_final(model, trainings[0].trainer.processing_class, tmp_path / "final")
    from transformers import AutoModelForImageTextToText

    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(report.values())
    base = AutoModelForImageTextToText.from_pretrained(training.profile.models.policy.path)
    changed = [n for n, p in loaded.named_parameters() if not torch.equal(p, base.get_parameter(n))]
    assert any("language_model" in n for n in changed) and not any("visual.blocks" in n for n in changed)
