"""Is a reader valid? What it answers from captions that are known to be true, long, padded, empty or foreign (ours).

One Prism run a reader, runs/<profile>/readers/<role>, in which caption number n of every image is the probe of that
place in `names`; its overall mean means nothing. Only for images whose facts are known.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from caprl_utils.captions.caption import token_counter
from caprl_utils.hashing import code_hashes, derive_seed
from caprl_utils.models.base import open_backend
from caprl_utils.prism.evaluate import evaluate
from caprl_utils.prism.sources import Captions, PrismImage, Source, TokenCounter, image_ids, written_captions
from caprl_utils.records import Sample
from caprl_utils.registry import world_of
from caprl_utils.schema import Profile

STAGE = "readers"
ROLES = ("prism_reader", "reward_reader")
INVENTED = (1, 2, 5)
_SHARES = (0.5, 0.75, 1.0)  # ours: of the longest caption that an evaluation allows
TRUE, OPTIONS = "complete true facts", "every option of every question"


def lengths(profile: Profile) -> list[int]:
    """Tokens that true captions are filled to."""
    return [round(share * profile.prism.caption_max_tokens) for share in _SHARES]


def repeated(count: int) -> str:
    """Name of the probe of that length."""
    return f"true facts repeated to {count} tokens"


def with_invented(count: int) -> str:
    """Name of the probe with so many invented statements."""
    return f"true facts and {count} invented"


def names(profile: Profile) -> list[str]:
    """The probes in the order of an image's captions; images without such questions lack the last."""
    filled = map(repeated, lengths(profile))
    return ["nothing", "another image's true facts", TRUE, *filled, *map(with_invented, INVENTED), OPTIONS]


def probe(profile: Profile, role: str, samples: Sequence[Sample]) -> dict[str, Any] | None:
    """Let the profile's model of a role read every probe; returns the run's record, None where facts are not known."""
    known = [sample for sample in samples if world_of(sample.meta)]
    if not known:
        return None
    reader = open_backend(profile.models[role], profile)
    return evaluate(profile, role, _source(profile, known), reader, known, stage=STAGE)


def _source(profile: Profile, samples: Sequence[Sample]) -> Source:
    count, asked = token_counter(profile.models.policy), {}
    for sample in samples:
        asked.setdefault(image_ids(sample)[0], []).append(sample)

    def captions(images: Sequence[PrismImage]) -> Captions:
        found = {}
        for image in images:
            others = [other for other in images if other.benchmark == image.benchmark]
            following = others[(others.index(image) + 1) % len(others)]
            texts = _texts(profile, image.id, asked, following.true_caption, count)
            found[image.id] = written_captions(image.id, texts, "probes", lambda text: count(text) if text else 0)
        return found

    made_by = {"names": names(profile), "seed": profile.seed, "code": code_hashes([__name__])}
    return Source("probes", {"source": "probes", **made_by}, captions)


def _texts(
    profile: Profile, image: str, asked: Mapping[str, Sequence[Sample]], foreign: str, count: TokenCounter
) -> list[str]:
    """The captions of one image, in the order of `names`. meta["asks"]: key of the fact that a question is about."""
    rng, meta = random.Random(derive_seed(profile.seed, "probes", image)), asked[image][0].meta
    world, true = world_of(meta), meta["true_caption"]
    told = [world.sentence(*fact) for fact in meta["facts"].items()]
    rng.shuffle(told)
    foreign_facts = _foreign(asked, image)
    drawn = rng.sample(sorted(foreign_facts), min(len(foreign_facts), max(INVENTED)))
    invented = [world.sentence(key, foreign_facts[key]) for key in drawn]
    texts = ["", foreign, true, *(_filled(true, told, most, count) for most in lengths(profile))]
    texts += [_mixed(rng, true, invented[:many]) for many in INVENTED]
    chosen = [sample for sample in asked[image] if sample.options]
    if not chosen or any("asks" not in sample.meta for sample in chosen):  # a fact's options can be told, no others
        return texts
    options = [world.sentence(sample.meta["asks"], option) for sample in chosen for option in sample.options]
    rng.shuffle(options)
    return [*texts, " ".join(options)]


def _foreign(asked: Mapping[str, Sequence[Sample]], image: str) -> dict[str, str]:
    """Facts of other images about things that this one does not show: of its own benchmark if that has enough."""
    own, of_all = asked[image][0], [found[0] for found in asked.values()]
    for others in ([other for other in of_all if other.benchmark == own.benchmark], of_all):
        facts = {key: value for other in others for key, value in other.meta["facts"].items()}
        found = {key: v for key, v in facts.items() if key not in own.meta["facts"] and key not in own.meta["known"]}
        if len(found) >= max(INVENTED):
            break
    return found


def _filled(text: str, sentences: Sequence[str], most: int, count: TokenCounter) -> str:
    """A text with its sentences said again as often as fits into so many tokens."""
    for sentence in cycle(sentences):
        if count(longer := f"{text} {sentence}") > most:
            return text
        text = longer
    return text


def _mixed(rng: random.Random, text: str, more: Sequence[str]) -> str:
    """A text with further sentences at places drawn behind the first."""
    parts = re.split(r"(?<=\.) ", text)
    for sentence in more:
        parts.insert(rng.randint(1, len(parts)), sentence)
    return " ".join(parts)
