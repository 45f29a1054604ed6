"""Fresh random models of the real classes, saved once per test session."""

from pathlib import Path

import pytest

from caprl_utils.config import load_profile
from caprl_utils.mini.zoo.models import build_language_model, build_processor, build_vlm, prepare_generation


def saved(model, processor, folder: Path) -> Path:
    prepare_generation(model)
    for part in (model, processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(build_vlm(seed=1), build_processor(), tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="session")
def reader_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(build_language_model(seed=2), build_processor().tokenizer, tmp_path_factory.mktemp("reader"))


@pytest.fixture(scope="session")
def profile():
    return load_profile("smoke").model_copy(update={"torch_threads": 1})
