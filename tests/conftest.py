"""For all tests: run folders of their own, no network, patience on a loaded machine."""

import gc
import os
import sys

import hypothesis
import pytest

from caprl_utils import paths
from caprl_utils.config import load_profile
from caprl_utils.rl.train import leave_out_vllm

hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and a second thread would wait spinning
sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema's check of addresses takes seconds to load


def pytest_configure(config: pytest.Config) -> None:
    """Only the integration tier runs vLLM; TRL would import it for all, 11 seconds in each process."""
    if "not integration" in config.option.markexpr:
        leave_out_vllm()


def pytest_collection_finish() -> None:
    """What is imported by now stays: garbage is looked for elsewhere, which takes seconds otherwise."""
    gc.freeze()


@pytest.fixture(autouse=True)
def runs_folder(tmp_path, monkeypatch):
    """The folder that stands for runs/ in this test, also in processes that it starts."""
    folder = tmp_path / "runs"
    monkeypatch.setattr(paths, "RUNS", folder)
    monkeypatch.setenv("CAPRL_RUNS", str(folder))
    return folder


@pytest.fixture
def quick_client(monkeypatch):
    """The client of model servers tries again at once and soon gives up."""
    from caprl_utils.models import endpoint

    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.1)
    monkeypatch.setattr(endpoint, "REQUEST_SEC", 1.0)
    monkeypatch.setattr(endpoint, "SILENT_SEC", 0.3)


@pytest.fixture(scope="session")
def qwen_tokenizer():
    """Folder of the real Qwen2.5 tokenizer; skips the test where it is not there."""
    from tests import qwen

    return qwen.tokenizer_folder()


@pytest.fixture(scope="session")
def qwen_reader(qwen_tokenizer, tmp_path_factory):
    """Folder of a tiny random Qwen2.5 with the real tokenizer."""
    from tests import qwen

    return qwen.save_reader(tmp_path_factory.mktemp("qwen") / "reader")


@pytest.fixture(scope="session")
def qwen_vlm(qwen_tokenizer, tmp_path_factory):
    """Folder of a tiny random Qwen2.5-VL with the real tokenizer and image processor."""
    from tests import qwen

    return qwen.save_vlm(tmp_path_factory.mktemp("qwen") / "vlm")


@pytest.fixture
def real_profile(tmp_path, qwen_vlm, qwen_reader):
    """Writes a profile over a real one ("one_gpu", "paper") that swaps paths and counts only; gives its file.

    Models are tiny and random behind the real tokenizer, benchmarks have a few rows each in their own columns. more:
    further sections.
    """
    import yaml

    from tests.rows import copies

    def make(name, **more):
        base = load_profile(name)
        readers = ("reward_reader", "prism_reader")
        folders = {role: qwen_reader if role in readers else qwen_vlm for role in base.models.named()}
        small = {"batch_size": 4, "max_pixels": 50_176}
        models = {role: {"path": str(folder)} | small for role, folder in folders.items()}
        prism = {
            "paths": copies(tmp_path / "data", 2), "num_samples": 4, "captions_per_image": 1, "caption_max_tokens": 8,
            "evaluation_files": str(tmp_path / "data" / "files"), "bootstrap_draws": 200,
        }  # fmt: skip
        del prism["paths"]["seed2k"]
        values = {"extends": name, "torch_threads": 1, "offline": True, "models": models, "prism": prism} | more
        file = tmp_path / f"{name}-tiny.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    return make
