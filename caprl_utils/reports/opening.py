"""The sentences that a page opens with: how many questions and images, who read, how often was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from caprl_utils.config import load_experiment
from caprl_utils.prism.benchmarks import get_benchmark
from caprl_utils.prism.statistics import AVERAGE
from caprl_utils.reports import numbers
from caprl_utils.reports.ablation_items import DOCUMENTS, NATURAL, Item
from caprl_utils.reports.results import Results
from caprl_utils.rl.experiments import MAIN
from caprl_utils.schema import RL, Profile

Trainings = Sequence[tuple[str, Mapping[str, Any]]]  # (file, record) of each training of a row


def counted(results: Results) -> str:
    """The small line below a figure of scores: "profile mini, 500 questions about 250 images"."""
    whole = results.parts[AVERAGE]
    return (
        f"profile {results.profile.name}, {numbers.count(whole.num_rows)} questions about "
        f"{numbers.count(whole.num_clusters)} images"
    )


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


def asked(results: Results) -> str:
    """Questions, images and benchmarks: "100 questions about 50 images in each of the 5 benchmarks"."""
    parts = [results.parts[name] for name in results.benchmarks]
    questions, images = _range([p.num_rows for p in parts]), _range([p.num_clusters for p in parts])
    many = len(results.benchmarks)
    return f"{questions} questions about {images} images in each of the {many} benchmarks"


def captioning(results: Results) -> str:
    """How captions were measured; floors and ceilings aside."""
    records = [r for found in results.measured.values() if not found.entry.bound for r in found.records]
    captions = _range([record["captions_per_image"] for record in records])
    readers = dict.fromkeys(f"{r['reader']['name']}, mode {r['reader']['mode']}" for r in records)
    return (
        f"Each captioner describes every image {captions} times; a text-only reader "
        f"({' or '.join(readers)}) answers from the caption alone. The score of a question is the mean over its "
        f"captions. {asked(results)}; intervals by bootstrap over images, "
        f"{numbers.count(results.profile.prism.bootstrap_draws)} draws."
    )


def ablation(item: Item, results: Results, trainings: Mapping[str, Trainings]) -> str:
    """Of Tables 4 to 6, Figures 1c and 5 and our own: what was measured, and trained how often on how many images."""
    by_group = item.figure == "growth" or any(claim.benchmarks for claim in item.claims)
    parts = [captioning(results), trained_rows(results.profile, trainings)]
    return " ".join([*parts, *([groups(results)] if by_group else [])])


def caption_limits(profile: Profile) -> str:
    """Why a captioner may write more tokens when it is evaluated than in training."""
    limits = main_training(profile).max_completion_tokens, profile.prism.caption_max_tokens
    training, evaluation = map(numbers.count, limits)
    return (
        f"A training cuts captions at {training} tokens (the dotted line, where captions come near it), the evaluation "
        f"at {evaluation}: a captioner that does not end by itself has more tokens in the table than in the figure."
    )


def groups(results: Results) -> str:
    """Which benchmarks are called documents and charts, which natural images, and which are neither."""
    names = {"Documents and charts": DOCUMENTS, "Natural images": NATURAL}
    parts = [f"{title}: {listed}." for title, keys in names.items() if (listed := _names(results, keys))]
    rest = _names(results, [key for key in results.benchmarks if key not in (*DOCUMENTS, *NATURAL)])
    return " ".join([*parts, *([f"In the average alone: {rest}."] if rest else [])])


def trained_rows(profile: Profile, records: Mapping[str, Trainings]) -> str:
    """How many trainings stand behind a row, and on how many images."""
    counts = {label: len(found) for label, found in records.items() if found}
    least = min(counts.values(), default=1)
    start = "One training a row" if least == 1 else f"{least} trainings a row"
    except_for = "".join(f", {count} of {label}" for label, count in counts.items() if count > least)
    sizes = {record["n"] for found in records.values() for _, record in found}
    return f"{start}{except_for}. {_training_images(profile, sizes)}".strip()


def _training_images(profile: Profile, sizes: set[int]) -> str:
    """Why some rows were trained on few images: their sets are compared at one size that each of them reaches."""
    few = profile.ablations.num_images
    rest = [size for size in sizes if size != few]
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


def _names(results: Results, keys: Sequence[str]) -> str:
    return ", ".join(get_benchmark(key).name for key in results.benchmarks if key in keys)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return numbers.count(low) if low == high else f"{numbers.count(low)} to {numbers.count(high)}"
