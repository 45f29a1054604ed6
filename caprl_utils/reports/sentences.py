"""The words beside the numbers: how was measured, how often trained, what a comparison rests on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_utils import paths
from caprl_utils.config import load_experiment
from caprl_utils.prism.statistics import AVERAGE
from caprl_utils.reports import claims, numbers
from caprl_utils.reports.items import CAPTIONERS, about_models, groups, texts
from caprl_utils.reports.results import Curve, Measured, Results, title_of
from caprl_utils.rl.experiments import MAIN
from caprl_utils.schema import RL, Profile

APART = "Other models, other benchmarks, other size: for orientation, never mixed with ours."
CAPTION_SETS = (
    "Of a set before loops and cut captions are left out. Facts told right: of all facts of the pictures. Statements "
    "wrong: of all that a caption states, also of what the picture does not show. Tokens are the captioner's own."
)
ROWS = "Vanilla goes without further pretraining. All rows of a setting share one alignment, for each training seed."


def summary(results: Results) -> str:
    """What an item found, in a line of the README's map; rows that were not measured are left out of it.

    Of a ladder the values in order and the difference of the last from the first; else all comparisons of one kind.
    """
    item = results.item
    if not item.ladder:
        known = {n: p for n, p in item.told_pairs.items() if all(label in results.measured for label in p)}
        return f"{item.told} " + ", ".join(f"{name} {_gap(results, *pair)}" for name, pair in known.items())
    labels = [label for label in item.ladder if label in results.measured]
    values = numbers.percents([results.interval(label, AVERAGE).value for label in labels])
    first, last = labels[0], labels[-1]
    if len(labels) == 2:
        return f"{last} against {first}: {' to '.join(values)} ({_gap(results, last, first)})"
    return f"{', '.join(labels)}: {', '.join(values)} ({last} against {first}: {_gap(results, last, first)})"


def _gap(results: Results, ours: str, theirs: str) -> str:
    """A difference of averages in points with its interval: "+8.4 [+5.6, +11.2]"."""
    gap = results.difference(ours, theirs)
    return f"{numbers.difference(gap.value)} {numbers.interval((gap.low, gap.high), signed=True)}"


def opening(results: Results) -> list[str]:
    """What was measured, and what it was trained on; stands above the tables."""
    item, profile = results.item, results.profile
    if item.kind == "pretraining":
        source = profile.pretraining.further.data
        models = {role: getattr(profile.models, role).path for role in CAPTIONERS}
        own = texts()["caption_writers"].get(source, "").format(**models)
        writers = own or f"The caption sets are files of the user ({source})."
        return [f"Each model looks at the image and answers; {_asked(results)}. {writers} {ROWS}"]
    if item.kind == "rl":
        by_group = item.figures == ["growth"] or any(claim.benchmarks for claim in item.claims)
        parts = [_captioning(results), _trained_rows(results), *([_groups(results)] if by_group else [])]
        return [" ".join(parts)]
    seeds = [
        seed for found in results.measured.values() for r in found.trainings.values() for seed in r["seeds"]
    ]
    trained = f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
    design = (
        f"{_captioning(results)} CapRL was trained with {trained}, any other trained row once; how much trainings "
        f"differ is not in the intervals. {_groups(results)}"
    )
    return [design, *_captioners(profile)]


def _captioners(profile: Profile) -> list[str]:
    """What the captioners are that the paper compares by size, where that must be said."""
    about = about_models(profile).get("captioners")
    if about is None:
        return []
    folders = [Path(paths.resolve_model(getattr(profile.models, role).path)) for role in CAPTIONERS]
    records = [json.loads((folder / "record.json").read_text(encoding="utf-8")) for folder in folders]
    sizes = numbers.numbers(sorted({record["parameters"] / 1e6 for record in records}))
    return [about.format(sizes=" or ".join(sizes))]


def _captioning(results: Results) -> str:
    """How captions were measured; floors and ceilings aside."""
    records = [
        r for found in results.measured.values() if not found.row.bound for r in found.records.values()
    ]
    readers = dict.fromkeys(f"{r['reader']['name']}, mode {r['reader']['mode']}" for r in records)
    captions = _range([record["captions_per_image"] for record in records])
    return (
        f"Each captioner describes every image {captions} times; a text-only reader ({' or '.join(readers)}) answers "
        f"from the caption alone. The score of a question is the mean over its captions. {_asked(results)}; intervals "
        f"by bootstrap over images, {numbers.count(results.profile.prism.bootstrap_draws)} draws."
    )


def _asked(results: Results) -> str:
    parts = [results.parts[name] for name in results.benchmarks]
    questions, images = _range([p.num_rows for p in parts]), _range([p.num_clusters for p in parts])
    return f"{questions} questions about {images} images in each of the {len(parts)} benchmarks"


def _groups(results: Results) -> str:
    """Which benchmarks are called documents and charts, which natural images, and which are neither."""
    found = groups()
    named = {"Documents and charts": found["documents"], "Natural images": found["natural"]}
    known = [key for keys in named.values() for key in keys]
    named["In the average alone"] = [key for key in results.benchmarks if key not in known]
    listed = {
        title: ", ".join(title_of(key) for key in results.benchmarks if key in keys)
        for title, keys in named.items()
    }
    return " ".join(f"{title}: {names}." for title, names in listed.items() if names)


def _trained_rows(results: Results) -> str:
    """How many trainings stand behind a row, and on how many images."""
    trainings = {label: found.trainings for label, found in results.measured.items() if found.trainings}
    counts = {label: len(found) for label, found in trainings.items()}
    least = min(counts.values(), default=1)
    start = "One training a row" if least == 1 else f"{least} trainings a row"
    except_for = "".join(f", {count} of {label}" for label, count in counts.items() if count > least)
    sizes = {record["n"] for found in trainings.values() for record in found.values()}
    return f"{start}{except_for}. {_training_images(results.profile, sizes)}".strip()


def _training_images(profile: Profile, sizes: set[int]) -> str:
    """Why some rows were trained on few images: their sets are compared at one size that each of them reaches."""
    few = profile.ablations.num_images
    rest = sizes - {few}
    parts = []
    if few in sizes:
        parts.append(
            f"Tables 4 and 6 and Figure 5, left, train on {numbers.count(few)} images a row (ablations.num_images): a "
            "number that each of their sets of questions or images reaches, so that these are compared at one size. "
            "Other trainings take all images with questions that passed the filter."
        )
    if rest:
        parts.append(
            f"{numbers.count(max(rest))} training images are all with questions that passed the filter; Tables 4 and 6 "
            f"and Figure 5, left, train on {numbers.count(few)} a row, which each of their sets reaches."
        )
    return " ".join(parts)


def main_training(profile: Profile) -> RL:
    """Settings of the trainings whose curves are drawn: those of the profile, under the experiment's own."""
    return load_experiment(MAIN, profile.name)[1].rl


def trained(profile: Profile) -> str:
    """The small line below a figure of training curves."""
    settings = main_training(profile)
    return (
        f"profile {profile.name}, a step: {settings.group_size} captions of each of "
        f"{settings.prompts_per_step} images"
    )


def caption_limits(profile: Profile) -> str:
    """Why a captioner may write more tokens when it is evaluated than in training."""
    limits = main_training(profile).max_completion_tokens, profile.prism.caption_max_tokens
    training, evaluation = map(numbers.count, limits)
    return (
        f"A training cuts captions at {training} tokens (the dotted line, where captions come near it), the evaluation "
        f"at {evaluation}: a captioner that does not end by itself has more tokens in the table than in the figure."
    )


def missing(results: Results) -> list[str]:
    """What of the whole table was not evaluated, by row and run."""
    rows = [
        f"{label} ({', '.join(names)})"
        for label, names in results.missing.items()
        if label not in results.measured
    ]
    notes = [f"Not evaluated, so not in the tables: {'; '.join(rows)}."] if rows else []
    for label, names in results.missing.items():
        if label in results.measured:
            there = len(results.measured[label].records)
            notes.append(
                f"{label} is averaged over {there} of {there + len(names)} training seeds; not evaluated: "
                f"{', '.join(names)}."
            )
    return notes


def under_gaps(results: Results, more_tests: bool, smallest: Sequence[float]) -> list[str]:
    """Notes of a table of differences. more_tests: there are others than its rows. smallest: difference that each
    benchmark can show (Table 3).
    """
    if results.item.kind == "prism":
        low, high = numbers.percent(min(smallest)), numbers.percent(max(smallest))
        return [
            "Paired by image: the same images are drawn for both captioners. p-values are corrected after Holm: those "
            "of single benchmarks over the benchmarks, that of the average over this table's rows and the other "
            "comparisons that the statements below make.",
            f"With these images a single benchmark shows a true difference of CapRL-3B from 3B (base) from {low} to "
            f"{high} points on, at 80 % power.",
        ]
    start = "Paired by image. p-values of the average are corrected after Holm over this table's rows"
    if results.item.kind == "pretraining":
        return [f"{start}. {_trainings_of_settings(results)}"]
    more = " and the statements' tests on groups of benchmarks" if more_tests else ""
    return [
        f"{start}{more}; how much trainings with another seed differ is not in the intervals where a row has one "
        "training."
    ]


def _trainings_of_settings(results: Results) -> str:
    """How many trainings stand behind the rows of VLMs, and what that means for the intervals."""
    words = {1: "One training", 2: "Two trainings", 3: "Three trainings"}
    counts = {found.row.setting: len(found.records) for found in results.measured.values()}
    settings: dict[int, list[str]] = {}
    for name, many in counts.items():
        settings.setdefault(many, []).append(name)
    told = {many: words.get(many, f"{many} trainings") for many in sorted(settings, reverse=True)}
    if len(told) == 1:
        text = f"{next(iter(told.values()))} a row"
    else:
        first, *rest = (f"{word} a row in setting {', '.join(settings[many])}" for many, word in told.items())
        text = ", ".join([first, *(part[0].lower() + part[1:] for part in rest)])
    averaged = " Scores of several are averaged question by question." if max(settings) > 1 else ""
    return f"{text}: how much trainings with another seed differ is not in the intervals.{averaged}"


def averages_of_trainings(found: Measured) -> list[str]:
    """Each training's own average, where there are several."""
    if len(found.records) < 2:
        return []
    texts = numbers.percents([record["values"][AVERAGE] for record in found.records.values()])
    each = ", ".join(f"{text} ({name})" for name, text in zip(found.names, texts, strict=True))
    return [f"Averages of the trainings of {found.row.label}: {each}."]


def of_table_3(results: Results, facts: Mapping[str, Any], curves: Sequence[Curve]) -> str:
    """What Table 3 says, a line each."""
    base, caprl = results.item.ladder
    gain = f"{numbers.difference(facts['gain'])} points, 95 % interval "
    gaps = {name: results.parts[name].difference(caprl, base) for name in results.benchmarks}
    above = [title_of(name) for name, gap in gaps.items() if gap.low > 0]
    tokens = numbers.numbers([results.measured[label].mean_of("caption_tokens") for label in (base, caprl)])
    lines = [
        f"- CapRL above base on the average: {facts['verdict']} ({gain}"
        f"{numbers.interval(facts['gain_interval'], signed=True)}).",
        f"- Interval above zero on {len(above)} of {len(gaps)} benchmarks: {', '.join(above) or 'none'}.",
        f"- Tokens per caption: {tokens[0]} (base), {tokens[1]} (CapRL).",
    ]
    for curve in curves:
        width = min(len(curve.rewards), claims.WINDOW_STEPS)
        first, last = numbers.numbers(claims.ends(curve.rewards), decimals=3)
        lines.append(
            f"- {curve.label}: {len(curve.steps)} training steps; mean reward of the first {width} {first}, "
            f"of the last {width} {last}."
        )
    unparsed = sum(sum(counts.values()) for found in facts["unparsed"].values() for counts in found)
    lines.append(f"- Answers that could not be read: {unparsed} in all runs together; they score 0.")
    return "\n".join(lines)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return numbers.count(low) if low == high else f"{numbers.count(low)} to {numbers.count(high)}"
