"""Is a judge valid? Pairs of captions made of known facts, of which one is better; for the verifier single sentences,
true and false (both ours).
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from caprl_utils.hashing import derive_seed
from caprl_utils.models.base import open_backend
from caprl_utils.prism.evaluate import samples_hash
from caprl_utils.records import Sample
from caprl_utils.registry import world_of
from caprl_utils.rl.rewards import TERMS, Rollout, chances_true, unified, vlm
from caprl_utils.runs import Run
from caprl_utils.schema import Profile

STAGE, VERIFIER = "judges", "verifier"
ROLES = {"vlm_judge": vlm, "reward_judge": unified}
ALL, ONE_WRONG, HALF_WRONG = "all facts", "all, one value wrong", "all, half of the values wrong"
HALF, TWICE = "half of the facts", "half of the facts, said twice"
PAIRS = ((ALL, ONE_WRONG), (ALL, HALF_WRONG), (ALL, HALF), (HALF, HALF_WRONG), (HALF, TWICE))
"""Better and worse caption."""
TRUE, WRONG, NOT_SHOWN = "true", "false: another value", "false: a thing not shown"
RECIPE = [__name__, "caprl_utils.rl.rewards", "caprl_utils.prompts"]


def trial(profile: Profile, role: str, samples: Sequence[Sample]) -> dict[str, Any] | None:
    """How often the profile's judge of a role scores the better of two captions higher: run judges/<role>. Values:
    "pairs", "better / worse" -> share of the images (a tie is half); "scores", caption -> mean, and its deviation over
    images. None where facts are not known.
    """
    known = {s.meta["image_id"]: s for s in samples if world_of(s.meta)}
    if not known:
        return None
    judge, images = open_backend(profile.models[role], profile), list(known.values())
    parts = {"judge": judge.model_hash, "samples": samples_hash(images), "seed": profile.seed}
    with Run.open(profile, STAGE, role, parts, RECIPE) as run:
        if run.complete:
            return run.result
        shown, values = [sample.images[0]() for sample in images], _values(known)
        made = {image: _captions(profile, image, sample, values) for image, sample in known.items()}
        scores, pairs, summary = {}, {}, {}
        for name in dict.fromkeys(name for pair in PAIRS for name in pair):
            texts = [captions[name] for captions in made.values()]
            rows = {"id": [f"{name}/{image}" for image in made], "image": shown}
            scores[name] = ROLES[role](Rollout(texts, [], rows), judge, profile.rl).rewards
            found = [score for score in scores[name] if score is not None]
            summary[name] = {"mean": statistics.fmean(found), "deviation": statistics.pstdev(found)} if found else {}
        for better, worse in PAIRS:
            both = [(a, b) for a, b in zip(scores[better], scores[worse], strict=True) if None not in (a, b)]
            ahead = sum((a > b) + 0.5 * (a == b) for a, b in both)
            pairs[f"{better} / {worse}"] = ahead / len(both) if both else None
        unparsed = sum(found.count(None) for found in scores.values())
        return run.finish({"pairs": pairs, "scores": summary}, len(images), "image", unparsed, judge=judge.name)


def verify(profile: Profile, samples: Sequence[Sample]) -> dict[str, Any] | None:
    """How often the verifier of the correctness reward takes a true sentence for false, or a false one for true, at a
    chance of one half: run judges/verifier.

    Values: kind of sentence -> "sentences" with an answer, "error" (a share), "chance" (mean chance of "yes"). Of each
    image all facts, as many false values and as many things that only another image shows. None where facts are not
    known.
    """
    known = {s.meta["image_id"]: s for s in samples if world_of(s.meta)}
    if not known:
        return None
    verifier = open_backend(profile.models[TERMS["correct"].role], profile)
    parts = {"verifier": verifier.model_hash, "samples": samples_hash([*known.values()]), "seed": profile.seed}
    with Run.open(profile, STAGE, VERIFIER, parts, RECIPE) as run:
        if run.complete:
            return run.result
        of_all, kinds, pixels = _values(known), {}, {image: sample.images[0]() for image, sample in known.items()}
        for image, sample in known.items():
            facts, rng = sample.meta["facts"], _random(profile, image)
            others = sorted(of_all.keys() - facts.keys())
            elsewhere = rng.sample(others, min(len(others), len(facts)))
            not_shown = {key: rng.choice(sorted(of_all[key])) for key in elsewhere}
            for kind, told in {TRUE: facts, WRONG: _wrong(facts, of_all, rng), NOT_SHOWN: not_shown}.items():
                kinds |= {(image, world_of(sample.meta).sentence(*fact)): kind for fact in told.items()}
        chances, mass = chances_true({key: pixels[key[0]] for key in kinds}, verifier)
        values = {}
        for kind in (TRUE, WRONG, NOT_SHOWN):
            found = [chances[key] for key, own in kinds.items() if own == kind and chances[key] is not None]
            wrong = sum((chance > 0.5) != (kind == TRUE) for chance in found)
            values[kind] = {
                "sentences": len(found), "error": wrong / len(found) if found else None,
                "chance": statistics.fmean(found) if found else None,
            }  # fmt: skip
        unread = sum(chance is None for chance in chances.values())
        return run.finish(values, len(known), "image", unread, judge=verifier.name, letter_mass=mass)


def _values(known: Mapping[str, Sample]) -> dict[str, set[str]]:
    """Key -> its values in all images."""
    values = defaultdict(set)
    for sample in known.values():
        for key, value in sample.meta["facts"].items():
            values[key].add(value)
    return values


def _random(profile: Profile, image: str) -> random.Random:
    return random.Random(derive_seed(profile.seed, "judges", image))


def _wrong(facts: Mapping[str, str], values: Mapping[str, set[str]], rng: random.Random) -> dict[str, str]:
    """Key -> a value that another image has for the same thing, where there is one."""
    return {key: rng.choice(sorted(values[key] - {value})) for key, value in facts.items() if values[key] - {value}}


def _captions(profile: Profile, image: str, sample: Sample, values: Mapping[str, set[str]]) -> dict[str, str]:
    """The captions of one image by name."""
    rng, facts = _random(profile, image), sample.meta["facts"]
    wrong, sentence = _wrong(facts, values, rng), world_of(sample.meta).sentence
    can = rng.sample([*wrong], len(wrong))  # in this order they are told falsely
    opening, keys = sample.meta["true_caption"].partition(".")[0], [*facts]

    def told(chosen: Sequence[str], false: Sequence[str] = ()) -> str:
        return " ".join([f"{opening}.", *(sentence(k, wrong[k] if k in false else facts[k]) for k in chosen)])

    return {
        ALL: told(keys), ONE_WRONG: told(keys, can[:1]), HALF_WRONG: told(keys, can[: len(keys) // 2]),
        HALF: told(keys[::2]), TWICE: told([*keys[::2], *keys[::2]]),
    }  # fmt: skip
