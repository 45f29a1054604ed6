"""A training in small: a fresh random policy of the mini world's shape, a handful of plain images and questions."""

import io
import json
from pathlib import Path

import pytest
import yaml

from caprl_utils import paths
from caprl_utils.config import load_experiment
from caprl_utils.rl import train
from caprl_utils.schema import Reward, Training

STEPS = 4
train._without_vllm()  # which takes longer to import than all else


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
    from caprl_utils.mini.tokenizer import build_tokenizer
    from caprl_utils.mini.zoo.models import build_language_model, build_processor, build_vlm
    from tests.models.conftest import saved

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
            "max_completion_tokens": 10, "rounds": 2, "beta": 0.05, "learning_rate": 1.0e-3, "save_every": 2,
        },
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(profile))
    (folder / "small.yaml").write_text("description: a test")
    write_questions(folder / "runs" / "tiny" / "curation" / "main" / "qa.parquet", num_images=6)
    return folder


@pytest.fixture
def runs(world, monkeypatch) -> Path:
    """The run folders of the small world, as paths.RUNS."""
    monkeypatch.setattr(paths, "RUNS", world / "runs")
    return world / "runs"


@pytest.fixture
def opened(world, runs, tmp_path):
    """Call with the policy's models, values of section rl and of training: a trainer of the small world in tmp_path."""

    def call(models=(), rl=(), term="qa", prompts="short", **training):
        from caprl_utils.rl.grpo import open_trainer

        profile = yaml.safe_load((world / "tiny.yaml").read_text()) | {"prompts": prompts}
        profile["models"] |= models
        profile["rl"] |= rl
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(profile))
        experiment, resolved = load_experiment(str(world / "small.yaml"), str(tmp_path / "tiny.yaml"))
        update = {"training": Training(**training), "reward": Reward(terms={term: 1.0})}
        return open_trainer(experiment.model_copy(update=update), resolved, 0, tmp_path)

    return call


def curve_of(trainer) -> list[dict]:
    """The rows of a whole training."""
    from caprl_utils.rl.monitor import Monitor

    folder = Path(trainer.args.output_dir)
    with Monitor(trainer, folder, None):
        assert trainer.fit(None)
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
