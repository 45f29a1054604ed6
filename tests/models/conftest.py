"""Fresh random models of the real classes, saved once per test session."""

import sys
from pathlib import Path

import pytest

from caprl_utils.config import load_profile
from caprl_utils.mini.zoo.models import build_language_model, build_processor, build_vlm, prepare_generation

sys.path.insert(0, str(Path(__file__).parent))  # the fake server lies beside its tests


def _saved(model, processor, folder: Path) -> Path:
    prepare_generation(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _saved(build_vlm(seed=1), build_processor(), tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="session")
def reader_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _saved(build_language_model(seed=2), build_processor().tokenizer, tmp_path_factory.mktemp("reader"))


@pytest.fixture(scope="session")
def profile():
    return load_profile("smoke").model_copy(update={"torch_threads": 1})
