"""Captions sampled by a real vLLM in the training's process: it reads what is trained on, and gives its numbers."""

import functools
import json

import pytest
import torch
import yaml

from caprl_utils import paths
from caprl_utils.config import load_experiment
from caprl_utils.schema import Training
from tests.rl.conftest import write_questions

pytestmark = [pytest.mark.integration, pytest.mark.timeout(3000)]


def plain_linear(layer, remove_weight):
    layer.cpu_linear = torch.nn.functional.linear


@pytest.fixture
def on_cpu(monkeypatch):
    """vLLM's engine as the server has it on a CPU, in this process; what it is asked is kept."""
    import trl.generation.vllm_generation as trls
    from vllm import LLM

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # a CPU's weights are packed after loading and cannot be pushed again; a GPU's stay as they are
    monkeypatch.setattr("vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm", plain_linear)
    how = {"enforce_eager": True, "dtype": "float32", "enable_chunked_prefill": False}
    monkeypatch.setattr(trls, "LLM", functools.partial(LLM, **how))


def test_colocated_vllm_reads_the_same_prompt_and_gives_the_same_log_probabilities(
    world, tmp_path, monkeypatch, on_cpu
):
    from caprl_utils.rl.grpo import open_trainer
    from caprl_utils.rl.monitor import Monitor

    profile = yaml.safe_load((world / "tiny.yaml").read_text())
    profile["models"] = {"policy": {"path": "zoo:vlm-3b", "max_pixels": 12_000}}  # pictures are larger
    profile["rl"] |= {"steps": 2, "max_completion_tokens": 24}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(profile))
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    write_questions(tmp_path / "tiny" / "curation" / "main" / "qa.parquet", num_images=6)
    experiment, resolved = load_experiment(str(world / "small.yaml"), str(tmp_path / "tiny.yaml"))
    training = Training(rollout="vllm_colocate", vllm_memory_share=0.2)
    trainer = open_trainer(experiment.model_copy(update={"training": training}), resolved, 0, tmp_path)
    read = []
    inner = trainer.vllm_generation.llm.generate

    def generate(prompts, **options):
        outputs = inner(prompts, **options)
        read.extend(
            (len(p["prompt_token_ids"]), len(o.prompt_token_ids))
            for p, o in zip(prompts, outputs, strict=True)
        )
        return outputs

    trainer.vllm_generation.llm.generate = generate
    with Monitor(trainer, tmp_path, None):
        assert trainer.fit(None)
    curve = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert all(asked < whole for asked, whole in read) and len(read) == 16
    assert all(row["logp_gap"] < 1e-4 for row in curve)
