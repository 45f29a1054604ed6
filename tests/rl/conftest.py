"""A training in small: a fresh random policy of the mini world's shape, a handful of plain images and questions."""

import io
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import yaml

from caprl_utils import paths
from caprl_utils.config import load_experiment
from caprl_utils.models.base import Request
from caprl_utils.models.local import draw, uniforms
from caprl_utils.rl import train
from caprl_utils.schema import Reward, Training

STEPS = 3
train.leave_out_vllm()  # which takes longer to import than all else


def write_questions(file: Path, num_images: int, size: tuple[int, int] = (140, 140)) -> None:
    """A parquet file in CapRL-QA-75K's schema, with plain pictures of a size."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rows = []
    for i in range(num_images):
        picture = io.BytesIO()
        Image.new("RGB", size, (10 * i % 255, 90, 200 - 10 * i % 200)).save(picture, "PNG")
        asked = {"choices": ["A) 1", "B) 2", "C) 3", "D) 4"], "answer": "BCD"[i % 3]}
        questions = [{"question": f"What is the value of {city}?"} | asked for city in ("Rome", "Oslo", "Lima")]
        rows.append({
            "id": f"image-{i:02d}", "image": {"bytes": picture.getvalue(), "path": None},
            "prompt": [{"role": "user", "content": "<image> Please describe this image in detail."}],
            "data_source": "image_caption_rl", "reward_model": {"ground_truth": questions},
        })  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders of a random policy and a random reader."""
    import torch

    from caprl_utils.mini.tokenizer import build_tokenizer
    from caprl_utils.mini.zoo.models import build_language_model, build_processor, build_vlm
    from tests.models.conftest import saved

    torch.set_num_threads(1)  # tests run side by side
    made = {"policy": (build_vlm(0), build_processor()), "reader": (build_language_model(1), build_tokenizer())}
    return {name: saved(*parts, tmp_path_factory.mktemp(name)) for name, parts in made.items()}


@pytest.fixture(scope="session")
def world(models, tmp_path_factory) -> Path:
    """A folder with a profile `tiny.yaml`, an experiment `small.yaml` and the questions that its trainings need."""
    folder = tmp_path_factory.mktemp("world")
    profile = {
        "extends": "mini", "torch_threads": 1, "models": {"policy": {"path": str(models["policy"])}},
        "rl": {
            "num_images": 6, "prompts_per_step": 4, "group_size": 2, "steps": STEPS, "warmup_steps": 1,
            "max_completion_tokens": 6, "rounds": 2, "beta": 0.05, "learning_rate": 1.0e-3, "save_every": 2,
        },
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(profile))
    (folder / "small.yaml").write_text("description: a test")
    write_questions(folder / "runs" / "tiny" / "curation" / "main" / "qa.parquet", 6, size=(56, 56))
    return folder


@pytest.fixture
def runs(world, monkeypatch) -> Path:
    """The run folders of the small world, as paths.RUNS."""
    monkeypatch.setattr(paths, "RUNS", world / "runs")
    return world / "runs"


def open_small(world: Path, folder: Path, models=(), rl=(), term="qa", prompts="short", **training):
    """A trainer of the small world in a folder. models, rl: over those of its profile. training: section training."""
    from caprl_utils.rl.grpo import open_trainer

    profile = yaml.safe_load((world / "tiny.yaml").read_text()) | {"prompts": prompts}
    profile["models"] |= models
    profile["rl"] |= rl
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(profile))
    experiment, resolved = load_experiment(str(world / "small.yaml"), str(folder / "tiny.yaml"))
    update = {"training": Training(**training), "reward": Reward(terms={term: 1.0})}
    return open_trainer(experiment.model_copy(update=update), resolved, 0, folder)


@pytest.fixture
def opened(world, runs, tmp_path):
    """Call with more of `open_small`: a trainer in tmp_path."""
    return partial(open_small, world, tmp_path)


def curve_of(trainer) -> list[dict]:
    """The rows of a whole training."""
    from caprl_utils.rl.monitor import Monitor

    folder = Path(trainer.args.output_dir)
    with Monitor(trainer, folder, None):
        assert trainer.fit(None)
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def options_of(prompt: str) -> dict[str, str]:
    """{letter: option} of a question as the reader sees it."""
    return {line[0]: line[3:] for line in prompt.splitlines() if line[1:3] == ") "}


class ChanceReader:
    """A reader that answers with given probabilities of the option texts; `None` from `chances` is a failure."""

    words = "short"

    def __init__(self, chances: Callable[[Request, dict[str, str]], dict[str, float] | None]):
        self.chances, self.prompts = chances, []

    def _letters(self, request: Request) -> dict[str, float] | None:
        self.prompts.append(request.prompt)
        return self.chances(request, options_of(request.prompt))

    def letter_logprobs(self, requests: Sequence[Request], letters: str) -> list[list[float] | None]:
        rows = map(self._letters, requests)
        return [row if row is None else [math.log(row.get(x, 0.0) or 1e-12) for x in letters] for row in rows]

    def answers(self, requests: Sequence[Request], temperature: float) -> list[str | None]:
        return [self._drawn(r, temperature) for r in requests]

    def _drawn(self, request: Request, temperature: float) -> str | None:
        row = self._letters(request)
        known = {letter: math.log(p) for letter, p in (row or {}).items() if p}
        if not known:
            return None if row is None else " nothing"
        return f" {[*known][draw([*known.values()], temperature, uniforms(0, request.id, 0, 1)[0])]}"
