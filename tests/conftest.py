"""For all tests: run folders of their own, no network, patience on a loaded machine."""

import os

import hypothesis
import pytest

from caprl_utils import paths

hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


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
