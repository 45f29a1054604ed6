"""Is a reader valid? What it answers from captions that are known to be true, long, padded, empty or foreign, and what
a reader that nobody here trained answers from captions that are there already (both ours).

Probes: one Prism run a reader, runs/<profile>/readers/<role>, in which caption number n of every image is the probe of
that place in `names`; its overall mean means nothing. Only for images whose facts are known.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from caprl_utils import paths
from caprl_utils.captions.caption import token_counter
from caprl_utils.hashing import code_hashes, derive_seed
from caprl_utils.images import ImageItem
from caprl_utils.models.base import Request, open_backend
from caprl_utils.prism import sources
from caprl_utils.prism.evaluate import evaluate
from caprl_utils.prism.loading import load_samples
from caprl_utils.prism.sources import Captions, Source, TokenCounter, image_ids, written_captions
from caprl_utils.records import Sample
from caprl_utils.registry import world_of
from caprl_utils.runs import load_result
from caprl_utils.schema import Profile

if TYPE_CHECKING:
    from caprl_utils.models.local import LocalBackend

STAGE = "readers"
ROLES = ("prism_reader", "reward_reader")
INVENTED = (1, 2, 5)
_SHARES = (0.8, 1.0)  # ours: of the longest caption that an evaluation allows
TRUE, OPTIONS = "complete true facts", "every option of every question"
REPEATED, WITH_INVENTED = "true facts repeated to {} tokens", "true facts and {} invented"


def lengths(profile: Profile) -> list[int]:
    """Tokens that true captions are filled to."""
    return [round(share * profile.prism.caption_max_tokens) for share in _SHARES]


def names(profile: Profile) -> list[str]:
    """The probes in the order of an image's captions; images without such questions lack the last."""
    filled, mixed = map(REPEATED.format, lengths(profile)), map(WITH_INVENTED.format, INVENTED)
    return ["nothing", "another image's true facts", TRUE, *filled, *mixed, OPTIONS]


def probe(profile: Profile, role: str, samples: Sequence[Sample]) -> dict[str, Any] | None:
    """Let the profile's model of a role read every probe; returns the run's record, None where facts are not known."""
    known = [sample for sample in samples if world_of(sample.meta)]
    if not known:
        return None
    count, asked = token_counter(profile.models.policy), {}
    for sample in known:
        asked.setdefault(image_ids(sample)[0], []).append(sample)

    def captions(images: Sequence[ImageItem]) -> Captions:
        found = {}
        for image in images:
            others = [other for other in images if other.kind == image.kind]
            following = others[(others.index(image) + 1) % len(others)]
            texts = _texts(profile, image.id, asked, following.meta["true_caption"], count)
            found[image.id] = written_captions(image.id, texts, "probes", lambda text: count(text) if text else 0)
        return found

    made_by = {"names": names(profile), "seed": profile.seed, "code": code_hashes([__name__])}
    source = Source("probes", {"source": "probes", **made_by}, captions)
    return evaluate(profile, role, source, open_backend(profile.models[role], profile), known, stage=STAGE)


def _texts(
    profile: Profile, image: str, asked: Mapping[str, Sequence[Sample]], foreign: str, count: TokenCounter
) -> list[str]:
    """The captions of one image, in the order of `names`. meta["asks"]: key of the fact that a question is about."""
    rng, meta = random.Random(derive_seed(profile.seed, "probes", image)), asked[image][0].meta
    world, true = world_of(meta), meta["true_caption"]
    told = [world.sentence(*fact) for fact in meta["facts"].items()]
    rng.shuffle(told)
    shown, of_all = {*meta["facts"], *meta["known"]}, [found[0] for found in asked.values()]
    for others in ([other for other in of_all if other.benchmark == asked[image][0].benchmark], of_all):
        facts = {key: value for other in others for key, value in other.meta["facts"].items() if key not in shown}
        if len(facts) >= max(INVENTED):  # of things not shown here: of its own benchmark if that has enough
            break
    drawn = rng.sample(sorted(facts), min(len(facts), max(INVENTED)))
    texts = ["", foreign, true]
    for most in lengths(profile):  # its facts said again as often as fits
        filled, again = true, cycle(told)
        while count(longer := f"{filled} {next(again)}") <= most:
            filled = longer
        texts.append(filled)
    for many in INVENTED:  # at places drawn behind the first sentence
        parts = re.split(r"(?<=\.) ", true)
        for key in drawn[:many]:
            parts.insert(rng.randint(1, len(parts)), world.sentence(key, facts[key]))
        texts.append(" ".join(parts))
    chosen = [sample for sample in asked[image] if sample.options]
    if not chosen or any("asks" not in sample.meta for sample in chosen):  # a fact's options can be told, no others
        return texts
    options = [world.sentence(sample.meta["asks"], option) for sample in chosen for option in sample.options]
    rng.shuffle(options)
    return [*texts, " ".join(options)]


# A reader from outside: no letters, the options' own words. Which option it means is found token by token: of the
# tokens that some option goes on with, the likeliest after "It is". A small model knows too little for letters
# (SmolLM2-135M: chance), and this needs no more of it than to copy.

OUTSIDE = "outside_reader"
QUESTIONS = 120  # ours: with options, the benchmarks' first; 135M parameters take 0.35 s of one core for each
HOW_TO_GET = (
    "no reader from outside: `make setup` fetches SmolLM2-135M-Instruct, and any other text model is read by "
    'make extras SET="models.outside_reader.path=FOLDER_OR_HUB_ID"'
)


class WordsReader:
    """Any text model of transformers as the reader of mode "words"; questions without options it cannot take."""

    def __init__(self, backend: LocalBackend, name: str) -> None:
        self._backend, self.name, self.model_hash = backend, name, backend.model_hash

    def choose(self, requests: Sequence[Request], options: Sequence[Sequence[str]]) -> list[int]:
        """Place of the option that the model means, of each request's own. An option's tokens are those behind "It is",
        with an end of its own, so that none is the beginning of another.
        """
        tokenizer, rows = self._backend.loaded.tokenizer, range(len(requests))
        ids = [[tokenizer(f" {option}.", add_special_tokens=False)["input_ids"] for option in some] for some in options]
        ids = [[[*own, tokenizer.eos_token_id] for own in some] for some in ids]
        alive = [[place for place, own in enumerate(some) if own not in some[:place]] for some in ids]
        loaded, size = self._backend.loaded, self._backend.batch_size
        order = sorted(rows, key=lambda row: len(requests[row].prompt))
        while open_rows := [row for row in order if len(alive[row]) > 1]:
            for start in range(0, len(open_rows), size):
                batch, asked, nexts = open_rows[start : start + size], [], []
                for row in batch:
                    left = [ids[row][place] for place in alive[row]]
                    common = next(n for n, tokens in enumerate(zip(*left, strict=False)) if len({*tokens}) > 1)
                    begun = tokenizer.decode(left[0][:common], clean_up_tokenization_spaces=False)
                    asked.append(replace(requests[row], prefill=requests[row].prefill + begun))
                    nexts.append({place: ids[row][place][common] for place in alive[row]})
                tokens = sorted({token for found in nexts for token in found.values()})
                logprobs = loaded.next_logprobs(loaded.encode(asked), tokens)
                for row, found, values in zip(batch, nexts, logprobs, strict=True):
                    chances = dict(zip(tokens, values, strict=True))
                    best = max(found.values(), key=chances.__getitem__)
                    alive[row] = [place for place, token in found.items() if token == best]
        return [places[0] for places in alive]


def read_outside(profile: Profile, runs: Sequence[str], more: Mapping[str, Source] = MappingProxyType({})) -> list[str]:
    """Let the reader from outside, if there, read the first captions of finished runs and of `more`, true and empty
    ones; the runs made.
    """
    config = profile.models.outside_reader
    folder = config and _unpacked(profile, paths.HOME / config.path)
    if folder is None:
        return []
    from caprl_utils.models.local import LocalBackend

    reader = WordsReader(LocalBackend(config.model_copy(update={"path": folder})), config.path)
    closed = [sample for sample in load_samples(profile) if sample.options]
    benchmarks = dict.fromkeys(sample.benchmark for sample in closed)
    each, samples = QUESTIONS // max(1, len(benchmarks)), []
    for name in benchmarks:
        samples += [sample for sample in closed if sample.benchmark == name][:each]
    known = {}
    for run in runs:
        if (home := paths.RUNS / profile.name / "prism" / run).joinpath("result.json").is_file():
            captioner = load_result(home)["captioner"]
            known[run] = sources.captions_of_run(home, captioner, lambda rows: rows[:1], source="kept", captions=1)
    for name, source in more.items():
        known[name] = replace(
            source, fingerprint={**source.fingerprint, "captions": 1},
            captions=lambda images, of=source.captions: {image: rows[:1] for image, rows in of(images).items()},
        )  # fmt: skip
    known["floor-empty"] = sources.empty_captions()
    if all(sample.meta.get("true_caption") for sample in samples):
        known["ceiling-true-facts"] = sources.true_captions(token_counter(profile.models.policy))
    made = {f"{run}-by-{OUTSIDE}": source for run, source in known.items()}
    for name, source in made.items():
        evaluate(profile, name, source, reader, samples, mode="words")
    return list(made)


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
        from transformers import AutoModelForCausalLM, AutoTokenizer

        where: Any = {"pretrained_model_name_or_path": path, "gguf_file": packed.name}
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(**where)
        del model.config.quantization_config  # on a CPU they are unpacked at loading
        plain = type(model)(model.config)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(folder)
    return str(folder)
