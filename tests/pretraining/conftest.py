"""Rows for real LLaMA-Factory runs."""

import pytest

from caprl_utils.hashing import file_hash
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


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A data folder with conversations of the mini world; returns folder and rows."""
    from caprl_utils.mini.source import training_rows

    folder = tmp_path_factory.mktemp("data")
    examples = []
    for name, image, turns in training_rows("sft", STEPS * BATCH, seed=1):
        image.save(folder / f"{name}.png")
        examples.append(about_image(name, f"{name}.png", turns))
    data.write_rows(folder, "sft", examples)
    return folder, examples


def dataset(rows):
    """The rows as a checked data set."""
    folder, examples = rows
    values = {"hash": file_hash(folder / "sft.jsonl"), "rows": len(examples)}
    return data.DataSet("sft", folder, folder, values)
