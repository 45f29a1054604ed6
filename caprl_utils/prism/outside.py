"""A reader that nobody here trained reads captions that are there already (ours): no letters, the options' own words.

Which option it means is found token by token: of the tokens that some option goes on with, the likeliest after "It is".
A small model knows too little for letters (SmolLM2-135M: chance), and this needs no more of it than to copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.captions.caption import token_counter
from caprl_utils.models.base import Request
from caprl_utils.models.local import LocalBackend
from caprl_utils.prism.controls import empty_captions, true_captions
from caprl_utils.prism.evaluate import evaluate
from caprl_utils.prism.loading import load_samples
from caprl_utils.prism.sources import Captions, PrismImage, Source, captions_of
from caprl_utils.runs import load_result
from caprl_utils.schema import Profile

ROLE = "outside_reader"
QUESTIONS = 120  # ours: with options, the benchmarks' first; 135M parameters take 0.35 s of one core for each
HOW_TO_GET = (
    "no reader from outside: `make setup` fetches SmolLM2-135M-Instruct, and any other text model is read by "
    'make extras SET="models.outside_reader.path=FOLDER_OR_HUB_ID"'
)


class WordsReader:
    """Any text model of transformers as the reader of mode "words"; questions without options it cannot take."""

    def __init__(self, profile: Profile, folder: str) -> None:
        """folder: of the model, or its hub id."""
        config = profile.models[ROLE]
        self._backend = LocalBackend(config.model_copy(update={"path": folder}))
        self.name = config.path

    @property
    def model_hash(self) -> str:
        return self._backend.model_hash

    def choose(self, requests: Sequence[Request], options: Sequence[Sequence[str]]) -> list[int]:
        """Place of the option that the model means, of each request's own."""
        tokenizer, rows = self._backend.loaded.tokenizer, range(len(requests))
        ids = [[self._ids(option) for option in some] for some in options]
        alive = [[place for place, own in enumerate(some) if own not in some[:place]] for some in ids]
        while open_rows := [row for row in rows if len(alive[row]) > 1]:
            asked, nexts = [], []
            for row in open_rows:
                left = [ids[row][place] for place in alive[row]]
                common = next(n for n, tokens in enumerate(zip(*left, strict=False)) if len({*tokens}) > 1)
                begun = tokenizer.decode(left[0][:common], clean_up_tokenization_spaces=False)
                asked.append(replace(requests[row], prefill=requests[row].prefill + begun))
                nexts.append({place: ids[row][place][common] for place in alive[row]})
            for row, tokens, best in zip(open_rows, nexts, self._likeliest(asked, nexts), strict=True):
                alive[row] = [place for place, token in tokens.items() if token == best]
        return [places[0] for places in alive]

    def _ids(self, option: str) -> list[int]:
        """Tokens of an option behind "It is", with an end of its own, so that none is the beginning of another."""
        tokenizer = self._backend.loaded.tokenizer
        return [*tokenizer(f" {option}.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def _likeliest(self, requests: Sequence[Request], nexts: Sequence[dict[int, int]]) -> list[int]:
        """The likeliest next token of each request, of those in `nexts`."""
        loaded, size = self._backend.loaded, self._backend.batch_size
        order = sorted(range(len(requests)), key=lambda row: len(requests[row].prompt))
        best = [0] * len(requests)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            tokens = sorted({token for row in rows for token in nexts[row].values()})
            found = loaded.next_logprobs(loaded.encode([requests[row] for row in rows]), tokens)
            for row, values in zip(rows, found, strict=True):
                chances = dict(zip(tokens, values, strict=True))
                best[row] = max(nexts[row].values(), key=chances.__getitem__)
        return best


def read_outside(profile: Profile, runs: Sequence[str]) -> list[str]:
    """Let the profile's reader from outside read the first caption of each image of finished Prism runs, and true and
    empty ones; returns the names of the runs made, none where there is no such reader.
    """
    config = profile.models.outside_reader
    folder = config and _unpacked(profile, paths.HOME / config.path)
    if folder is None:
        return []
    reader, closed = WordsReader(profile, folder), [sample for sample in load_samples(profile) if sample.options]
    names = dict.fromkeys(sample.benchmark for sample in closed)
    samples = []
    for name in names:
        samples += [sample for sample in closed if sample.benchmark == name][: QUESTIONS // len(names)]
    home = paths.RUNS / profile.name / "prism"
    sources = {run: _kept(home / run) for run in runs if (home / run / "result.json").is_file()}
    sources |= {"floor-empty": empty_captions()}
    if all(sample.meta.get("true_caption") for sample in samples):
        sources["ceiling-true-facts"] = true_captions(token_counter(profile.models.policy))
    made = {f"{run}-by-{ROLE}": source for run, source in sources.items()}
    for name, source in made.items():
        evaluate(profile, name, source, reader, samples, mode="words")
    return list(made)


def _kept(run_folder: Path) -> Source:
    def captions(images: Sequence[PrismImage]) -> Captions:
        there = captions_of(run_folder)
        return {image.id: there[image.id][:1] for image in images if image.id in there}

    name = load_result(run_folder)["captioner"]
    return Source(name, {"source": "kept", "run": load_result(run_folder)["key"], "captions": 1}, captions)


def _unpacked(profile: Profile, path: Path) -> str | None:
    """A model's folder; of one that holds a GGUF file alone, a copy in the form of transformers, made once. A path that
    is no folder is a hub id, or None where the profile keeps off the hub.
    """
    if not path.is_dir():
        return None if profile.offline else str(path.relative_to(paths.HOME))
    packed = next(path.glob("*.gguf"), None)
    if packed is None or (path / "config.json").is_file():
        return str(path)
    folder = paths.RUNS / profile.name / "models" / packed.stem
    if not (folder / "model.safetensors").is_file():
        _unpack(packed, folder)
    return str(folder)


def _unpack(packed: Path, folder: Path) -> None:
    """Write a GGUF file's tokenizer and weights as transformers keeps them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: Any = {"pretrained_model_name_or_path": packed.parent, "gguf_file": packed.name}
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(**where)
    del model.config.quantization_config  # on a CPU they are unpacked at loading
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
