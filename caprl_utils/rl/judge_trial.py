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

STAGE = "judges"
ROLES = {"vlm_judge": vlm, "reward_judge": unified}
ALL, ONE_WRONG, HALF_WRONG = "all facts", "all, one value wrong", "all, half of the values wrong"
HALF, TWICE = "half of the facts", "half of the facts, said twice"
PAIRS = ((ALL, ONE_WRONG), (ALL, HALF_WRONG), (ALL, HALF), (HALF, HALF_WRONG), (HALF, TWICE))
"""Better and worse caption."""
VERIFIER = "verifier"
TRUE, WRONG, NOT_SHOWN = "true", "false: another value", "false: a thing not shown"


def trial(profile: Profile, role: str, samples: Sequence[Sample]) -> dict[str, Any] | None:
    """How often the profile's judge of a role scores the better of two captions higher: run judges/<role>.

    Values: "pairs", "better / worse" -> share of the images (a tie is half); "scores", caption -> mean, and its
    deviation over images. None where facts are not known.
    """
    known = {s.meta["image_id"]: s for s in samples if world_of(s.meta)}
    if not known:
        return None
    judge, images = open_backend(profile.models[role], profile), list(known.values())
    parts = {"judge": judge.model_hash, "samples": samples_hash(images), "seed": profile.seed}
    recipe = [__name__, "caprl_utils.rl.rewards", "caprl_utils.prompts"]
    with Run.open(profile, STAGE, role, parts, recipe) as run:
        if run.complete:
            return run.result
        made, shown = _captions(profile, known), [sample.images[0]() for sample in images]
        scores = {}
        for name in dict.fromkeys(name for pair in PAIRS for name in pair):
            texts = [captions[name] for captions in made.values()]
            rows = {"id": [f"{name}/{image}" for image in made], "image": shown}
            scores[name] = ROLES[role](Rollout(texts, [], rows), judge, profile.rl).rewards
        return run.finish(
            {"pairs": {" / ".join(pair): _ahead(*(scores[name] for name in pair)) for pair in PAIRS},
             "scores": {name: _mean_and_deviation(found) for name, found in scores.items()}},
            n=len(images), unit="image", unparsed=sum(found.count(None) for found in scores.values()),
            judge=judge.name,
        )  # fmt: skip


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
    with Run.open(profile, STAGE, VERIFIER, parts, [__name__, "caprl_utils.rl.rewards", "caprl_utils.prompts"]) as run:
        if run.complete:
            return run.result
        of_all, kinds, pixels = _values(known), {}, {image: sample.images[0]() for image, sample in known.items()}
        for image, sample in known.items():
            sentence, facts = world_of(sample.meta).sentence, sample.meta["facts"]
            for kind, told in _facts_of_each_kind(facts, of_all, _random(profile, image)).items():
                kinds |= {(image, sentence(*fact)): kind for fact in told.items()}
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


def _facts_of_each_kind(
    facts: Mapping[str, str], values: Mapping[str, set[str]], rng: random.Random
) -> dict[str, dict[str, str]]:
    """Kind of sentence -> the facts that such sentences about an image state."""
    others = sorted(values.keys() - facts.keys())
    not_shown = {key: rng.choice(sorted(values[key])) for key in rng.sample(others, min(len(others), len(facts)))}
    return {TRUE: facts, WRONG: _wrong(facts, values, rng), NOT_SHOWN: not_shown}


def _values(known: Mapping[str, Sample]) -> dict[str, set[str]]:
    """Key -> its values in all images."""
    values = defaultdict(set)
    for sample in known.values():
        for key, value in sample.meta["facts"].items():
            values[key].add(value)
    return values


def _wrong(facts: Mapping[str, str], values: Mapping[str, set[str]], rng: random.Random) -> dict[str, str]:
    """Key -> a value that another image has for the same thing, where there is one."""
    return {key: rng.choice(sorted(values[key] - {value})) for key, value in facts.items() if values[key] - {value}}


def _random(profile: Profile, image: str) -> random.Random:
    return random.Random(derive_seed(profile.seed, "judges", image))


def _captions(profile: Profile, known: Mapping[str, Sample]) -> dict[str, dict[str, str]]:
    """Image -> captions by name."""
    values, made = _values(known), {}
    for image, sample in known.items():
        rng = _random(profile, image)
        wrong = _wrong(sample.meta["facts"], values, rng)
        made[image] = _variants(sample.meta, wrong, rng.sample([*wrong], len(wrong)))
    return made


def _variants(meta: Mapping[str, Any], wrong: Mapping[str, str], can: Sequence[str]) -> dict[str, str]:
    """The captions of one image. wrong: key -> a false value; can: these keys in the order in which they are taken."""
    facts, sentence = meta["facts"], world_of(meta).sentence
    opening, keys = meta["true_caption"].partition(".")[0], [*facts]

    def told(chosen: Sequence[str], false: Sequence[str] = ()) -> str:
        return " ".join([f"{opening}.", *(sentence(k, wrong[k] if k in false else facts[k]) for k in chosen)])

    return {
        ALL: told(keys), ONE_WRONG: told(keys, can[:1]), HALF_WRONG: told(keys, can[: len(keys) // 2]),
        HALF: told(keys[::2]), TWICE: told([*keys[::2], *keys[::2]]),
    }  # fmt: skip


def _ahead(better: Sequence[float | None], worse: Sequence[float | None]) -> float | None:
    both = [(a, b) for a, b in zip(better, worse, strict=True) if None not in (a, b)]
    return sum((a > b) + 0.5 * (a == b) for a, b in both) / len(both) if both else None


def _mean_and_deviation(scores: Sequence[float | None]) -> dict[str, float]:
    found = [score for score in scores if score is not None]
    return {"mean": statistics.fmean(found), "deviation": statistics.pstdev(found)} if found else {}
