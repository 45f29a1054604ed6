"""Captions sampled by a real vLLM in the training's process: it reads what is trained on, and gives its numbers."""

import functools
import os
import sys

import pytest
import torch

from caprl_utils import paths
from tests.rl.conftest import curve_of, write_questions

pytestmark = [pytest.mark.integration, pytest.mark.timeout(3000)]


def plain_linear(layer, remove_weight):
    layer.cpu_linear = torch.nn.functional.linear


@pytest.fixture
def on_cpu(monkeypatch):
    """vLLM's engine as the server has it on a CPU, in this process; what it leaves there goes with the test."""
    import trl.generation.vllm_generation as trls

    if sys.modules.get("mistral_common", trls) is None:  # see conftest
        monkeypatch.delitem(sys.modules, "mistral_common")
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.sampling_params import StructuredOutputsParams

    before = dict(os.environ)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # a CPU's weights are packed after loading and cannot be pushed again; a GPU's stay as they are
    monkeypatch.setattr("vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm", plain_linear)
    how = {"enforce_eager": True, "dtype": "float32", "enable_chunked_prefill": False}
    there = {"LLM": functools.partial(LLM, **how), "SamplingParams": SamplingParams,
             "StructuredOutputsParams": StructuredOutputsParams, "is_vllm_available": lambda: True}  # fmt: skip
    for name, value in there.items():
        monkeypatch.setattr(trls, name, value, raising=False)
    yield
    cleanup_dist_env_and_memory()
    os.environ.clear()
    os.environ.update(before)  # TRL sets RANK and others, which every process started later would take for its own


def test_colocated_vllm_reads_the_same_prompt_and_gives_the_same_log_probabilities(
    opened, tmp_path, monkeypatch, on_cpu
):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    write_questions(tmp_path / "tiny" / "curation" / "main" / "qa.parquet", num_images=6)
    policy = {"path": "zoo:base", "max_pixels": 12_000}  # pictures are larger
    how = {"rollout": "vllm_colocate", "vllm_memory_share": 0.2}
    trainer = opened({"policy": policy}, {"steps": 2, "max_completion_tokens": 24}, **how)
    read, inner = [], trainer.vllm_generation.llm.generate

    def generate(prompts, **options):
        outputs = inner(prompts, **options)
        pairs = zip(prompts, outputs, strict=True)
        read.extend((len(p["prompt_token_ids"]), len(o.prompt_token_ids)) for p, o in pairs)
        return outputs

    trainer.vllm_generation.llm.generate = generate
    curve = curve_of(trainer)
    assert all(asked < whole for asked, whole in read) and len(read) == 16
    assert all(row["logp_gap"] < 1e-4 for row in curve)
