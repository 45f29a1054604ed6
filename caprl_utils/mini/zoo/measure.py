"""What the models of the zoo can do, on pictures that none of them was taught on: the figures in their records."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from caprl_utils import prompts
from caprl_utils.answers import read_letter
from caprl_utils.hashing import derive_seed
from caprl_utils.mini.render import render
from caprl_utils.mini.world import KINDS, Fact, Picture, caption, distractors, picture
from caprl_utils.models.base import Backend, Request, Sampling

LETTERS = [f" {letter}" for letter in prompts.LETTERS[:5]]


def held_out(count: int) -> list[Picture]:
    """Pictures of all kinds in turn, from a split that no lesson uses."""
    return [picture("zoo-held-out", i) for i in range(count)]


def questions(shown: Picture, facts: Sequence[Fact], extra: bool) -> list[tuple[str, list[str], str]]:
    """(question, options, right letter) for each of ``facts``, shuffled by a seed of their own."""
    asked = []
    for fact in facts:
        rng = random.Random(derive_seed("measure", shown.id, fact.key))
        options = [fact.value, *distractors(rng, fact, shown.facts)]
        rng.shuffle(options)
        letter = prompts.LETTERS[options.index(fact.value)]
        asked.append((fact.question, [*options, prompts.CANNOT_ANSWER] if extra else options, letter))
    return asked


def reader_accuracy(reader: Backend, captions: Sequence[tuple[Picture, str]], known: bool = False) -> float:
    """Share of all questions about the pictures that the reader answers right from these captions."""
    requests, gold = [], []
    for shown, text in captions:
        for question, options, letter in questions(shown, shown.known if known else shown.facts, extra=True):
            prompt = prompts.read_question(text, question, options)
            requests.append(Request(str(len(requests)), prompt, prefill=prompts.ANSWER_PREFILL))
            gold.append(letter)
    scores = reader.choice_logprobs(requests, LETTERS)
    return sum(LETTERS[row.index(max(row))].strip() == g for row, g in zip(scores, gold, strict=True)) / len(
        gold
    )


def reader_figures(reader: Backend, count: int = 60) -> dict[str, float]:
    """Accuracy with true, empty, foreign and value-listing captions, and on what needs no caption."""
    shown = held_out(count)
    true = [(p, caption(p.facts, p.kind)) for p in shown]
    foreign = [(p, true[(i + len(KINDS)) % count][1]) for i, p in enumerate(shown)]
    return {
        "true caption": reader_accuracy(reader, true),
        "empty caption": reader_accuracy(reader, [(p, "") for p in shown]),
        "another image's caption": reader_accuracy(reader, foreign),
        "values shuffled over keys": reader_accuracy(reader, [(p, misplaced(p)) for p in shown]),
        "knowledge without caption": reader_accuracy(reader, [(p, "") for p in shown if p.known], known=True),
    }


def misplaced(shown: Picture) -> str:
    """A caption that lists the right values under the wrong keys: must not score (reward hacking)."""
    facts = []
    for fact in shown.facts:
        same = [o.value for o in shown.facts if o.options == fact.options and o.value != fact.value]
        rng = random.Random(derive_seed("misplaced", shown.id, fact.key))
        wrong = same or [v for v in fact.options if v != fact.value]
        facts.append(Fact(fact.key, rng.choice(wrong), fact.options))
    return caption(facts, shown.kind)


def told_facts(text: str, shown: Picture) -> tuple[int, int]:
    """How many facts of the picture a caption tells right, and how many sentences about its keys are wrong."""
    sentences = {s.strip() for s in text.replace(". ", ".\n").split("\n")}
    right = sum(fact.sentence in sentences for fact in shown.facts)
    claims = sum(any(s.startswith(f"The {fact.key} is ") for s in sentences) for fact in shown.facts)
    return right, claims - right


def captioner_figures(model: Backend, count: int = 60, temperature: float = 1.0) -> dict[str, float]:
    """Shares of facts told right and of claims that are false, and caption length in tokens."""
    shown = held_out(count)
    requests = [Request(p.id, prompts.CAPTION, render(p)) for p in shown]
    completions = model.generate(requests, Sampling(max_tokens=96, temperature=temperature, seed=1))
    counts = [told_facts(c.text or "", p) for c, p in zip(completions, shown, strict=True)]
    right, wrong = (sum(c[i] for c in counts) for i in (0, 1))
    return {
        "facts told right": right / sum(len(p.facts) for p in shown),
        "claims that are false": wrong / max(1, right + wrong),
        "tokens": sum(c.num_tokens for c in completions) / count,
        "cut": sum(c.finish_reason == "length" for c in completions) / count,
    }


def looking_accuracy(model: Backend, count: int = 40, with_image: bool = True, known: bool = False) -> float:
    """Share of multiple-choice questions that a VLM answers right with (or without) the image."""
    requests, gold, listed = [], [], []
    for shown in held_out(count):
        image = render(shown) if with_image else None
        for question, options, letter in questions(shown, shown.known if known else shown.facts, extra=False):
            prompt = prompts.look_question(question, options)
            requests.append(Request(str(len(requests)), prompt, image, prompts.ANSWER_PREFILL))
            gold.append(letter)
            listed.append(options)
    answers = model.generate(requests, Sampling(max_tokens=3))
    found = (read_letter(a.text, options=options).letter for a, options in zip(answers, listed, strict=True))
    return sum(letter == g for letter, g in zip(found, gold, strict=True)) / len(gold)


def vlm_figures(model: Backend) -> dict[str, float]:
    """Captioning and question answering of a VLM."""
    return captioner_figures(model) | {
        "questions with image": looking_accuracy(model),
        "questions without image": looking_accuracy(model, with_image=False),
        "knowledge without image": looking_accuracy(model, with_image=False, known=True),
    }


def judge_figures(judge: Backend, count: int = 40) -> dict[str, float]:
    """Mean rewards (0 to 1) that the judge gives, asked in both ways, to captions whose truth is known."""
    from caprl_utils.rl.judges import unified_rewards, vlm_rewards

    shown = held_out(count)
    images = [render(p) for p in shown]
    captions = {
        "true and complete": [caption(p.facts, p.kind) for p in shown],
        "half of it": [caption(p.facts[: len(p.facts) // 2], p.kind) for p in shown],
        "said twice": [caption([*p.facts, *p.facts], p.kind) for p in shown],
        "all values wrong": [misplaced(p) for p in shown],
        "another image's": [caption(p.facts, p.kind) for p in [*shown[len(KINDS) :], *shown[: len(KINDS)]]],
        "no statement": [caption([], p.kind) for p in shown],
    }
    figures = {}
    for way, rate in (("score", vlm_rewards), ("unified", unified_rewards)):
        for name, texts in captions.items():
            rewards = [r for r in rate(texts, images, [p.id for p in shown], judge).rewards if r is not None]
            figures[f"{way}, {name}"] = sum(rewards) / len(rewards) if rewards else float("nan")
    return figures


def main() -> None:
    """Print the figures of the shipped models named, or of all."""
    import argparse

    from caprl_utils.config import load_profile
    from caprl_utils.mini.zoo.train import RECIPES
    from caprl_utils.models.base import open_backend
    from caprl_utils.paths import ZOO
    from caprl_utils.schema import ModelConfig

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "names", nargs="*", default=[n for n in RECIPES if (ZOO / n / "config.json").is_file()]
    )
    for name in parser.parse_args().names:
        model = open_backend(ModelConfig(path=f"zoo:{name}", batch_size=64), load_profile("mini"))
        measure = vlm_figures if RECIPES[name].vision else reader_figures
        figures = (judge_figures if RECIPES[name].lesson == "judging" else measure)(model)
        print(name, json.dumps({k: round(v, 3) for k, v in figures.items()}), flush=True)


if __name__ == "__main__":
    main()
