"""Rows for real LLaMA-Factory runs."""

import pytest

from caprl_utils.config import load_profile
from caprl_utils.hashing import file_hash
from caprl_utils.mini.source import training_rows
from caprl_utils.pretraining import data, llamafactory
from caprl_utils.records import about_image

STEPS, BATCH = 6, 2
MISSING = "no .venv-llamafactory: make setup-llamafactory"
REAL = [
    pytest.mark.integration,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not llamafactory.ENVIRONMENT.is_dir(), reason=MISSING),
]
"""Marks of tests that run the real LLaMA-Factory."""


class WordCounter:
    """A token a word, a token for every 28 x 28 pixels."""

    def image_tokens(self, width, height):
        return (width // 28) * (height // 28)

    def text_tokens(self, example):
        return sum(len(message.content.split()) for message in example.messages)


def data_set(folder, examples):
    """Conversations as a checked data set; their images lie in the same folder."""
    data.write_rows(folder, "sft", examples)
    values = {"hash": file_hash(folder / "sft.jsonl"), "rows": len(examples)}
    return data.DataSet("sft", folder, folder, values)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Conversations of the mini world."""
    folder, examples = tmp_path_factory.mktemp("data"), []
    for name, image, turns in training_rows("sft", STEPS * BATCH, seed=1):
        image.save(folder / f"{name}.png")
        examples.append(about_image(name, f"{name}.png", turns))
    return data_set(folder, examples)


def small_profile(**changed):
    """Profile mini with stages of six steps. changed: more of the section `pretraining`."""
    stage = {"num_rows": STEPS * BATCH, "batch_size": BATCH, "micro_batch_size": BATCH, "num_epochs": 1}
    stages = dict.fromkeys(("align", "further", "sft"), stage)
    pace = {"align_of": {"mini-internlm-clip": {"num_epochs": 1}}}
    return load_profile("mini", {"pretraining": stages | pace | {"save_every": 2, "parallel_runs": 1} | changed})
