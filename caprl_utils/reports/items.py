"""What the tables and figures compare and state: rows of runs, comparisons, claims. Data only.

Table 3, Tables 4 to 6, Figures 1c and 5 and our own extras stand in configs/reports.yaml. Tables 1 and 2 and Figure 4
follow from a profile's pretraining settings and stand here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any, Literal

from caprl_utils import paths
from caprl_utils.config import read_yaml
from caprl_utils.errors import UserError, did_you_mean
from caprl_utils.files import note_access
from caprl_utils.pretraining import data, sets
from caprl_utils.pretraining.sets import CAPRL_1M, DENSEFUSION, VANILLA, CaptionSet
from caprl_utils.prism.sources import budget_run
from caprl_utils.rl import experiments
from caprl_utils.rl.experiments import run_name
from caprl_utils.schema import Profile

FILE = paths.CONFIGS / "reports.yaml"
FOLLOW_UPS = "extra_rewards"  # the item whose statements are those of papers that followed this one
CAPTIONERS = ("policy", "captioner_7b", "captioner_72b")  # roles of the models compared by size
Kind = Literal["prism", "rl", "pretraining"]
NOTEBOOKS: Mapping[Kind, str] = {
    "prism": "04_prism_evaluation", "rl": "03_caprl_rl_training", "pretraining": "05_llamafactory_pretraining",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One row. Runs are named "<stage>/<run>", a folder under runs/<profile>."""

    label: str
    runs: tuple[str, ...]  # evaluations, one for each of `seeds`
    seeds: tuple[int, ...] = ()  # of its trainings; none: it was not trained
    trainings: tuple[str, ...] = ()  # one for each seed
    more: tuple[str, ...] = ()  # further runs behind it
    captions: tuple[str, str] | None = None  # (name, run) of the caption set that it was trained on
    paper: tuple[str, ...] | None = None  # labels of its row in the item's CSV of reports/paper
    bound: bool = False  # a floor, ceiling or control
    budget: int | None = None  # tokens that its captions are cut to
    setting: str = ""  # of the pretraining


GUESSER = Row("floor: the most frequent answer to each kind of question", ())  # see prism.scores.most_frequent


@dataclass(frozen=True)
class Claim:
    """One statement: `ours` against `theirs`, both labels of rows. Kinds: see configs/reports.yaml."""

    text: str
    ours: str
    theirs: str = ""
    kind: Literal[
        "accuracy", "no gain", "as good", "larger gain", "tokens", "false share", "false count", "repeats", "reward"
    ] = "accuracy"  # fmt: skip
    benchmarks: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    share: float = 1.0
    not_testable: str = ""  # why the profile's models cannot test it
    same_as: str = ""  # "table3 (1)": the statement whose fact it repeats


@dataclass(frozen=True)
class Item:
    """One table or figure of the paper, or of ours. ladder, or told with its pairs: what the README says of it."""

    name: str
    title: str
    rows: Sequence[Row]
    pairs: Sequence[tuple[str, str]]  # compared rows
    needed: Sequence[str]  # labels without which there is nothing to show
    claims: Sequence[Claim] = ()
    kind: Kind = "rl"  # what its rows were made by
    ladder: Sequence[str] = ()
    told: str = ""
    told_pairs: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    paper: str | None = None  # CSV of reports/paper
    figures: Sequence[Literal["dots", "curves", "growth", "sets", "readers", "pareto"]] = ()
    notes: Sequence[str] = ()

    @property
    def short(self) -> str:
        """ "Table 3"."""
        return self.title.split(":")[0]

    @property
    def target(self) -> str:
        """The target of the Makefile that makes it."""
        groups = {FOLLOW_UPS: "rewards", "extra": "extras", "figure1c": "figures", "figure5": "figures"}
        return groups.get(self.name, groups.get(self.name.split("_")[0], self.name))

    @property
    def experiments(self) -> list[str]:
        """The trainings of notebook 03 behind it, each once."""
        runs = (run for row in self.rows for run in row.trainings if self.kind == "rl")
        return list(dict.fromkeys(run.removeprefix("rl/").rsplit("-seed", 1)[0] for run in runs))

    @property
    def read_twice(self) -> list[str]:
        """Of these, those that the reader of the reward reads as well."""
        rows = [row for row in self.rows if row.runs and row.runs[0].endswith("-by-reward_reader")]
        return replace(self, rows=rows).experiments

    @property
    def ours(self) -> bool:
        """Whether it is no item of the paper."""
        return self.name.startswith("extra")


@functools.cache
def texts() -> Mapping[str, Any]:
    """configs/reports.yaml."""
    return read_yaml(FILE)


def about_models(profile: Profile) -> Mapping[str, Any]:
    """What must be said of a profile's models: "licence", "limits", "data", and "captioners", "not_testable" if any."""
    found = [model.path for role, model in profile.models.named().items() if role in CAPTIONERS]
    return next(entry for entry in texts()["models"] if all(fnmatch(path, entry["path"]) for path in found))


def items(profile: Profile) -> dict[str, Item]:
    """All of them by name: the paper's tables, its figures, then ours. Raises UserError where a claim is the same as
    one that is none.
    """
    note_access(FILE)
    listed = [_listed(profile, name, **entry) for name, entry in texts()["items"].items()]
    found = {item.name: item for item in (table1(profile), table2(profile), figure4(profile), *listed)}

    def linked(claim: Claim) -> Claim:
        """A claim whose `same_as` reads as a page names it: "Table 3 (1)"."""
        if not claim.same_as:
            return claim
        name, number = claim.same_as.rstrip(")").split(" (")
        if name not in found or not 0 < int(number) <= len(found[name].claims):
            told = f"{claim.text!r} is the same as {claim.same_as}, which is no statement"
            raise UserError(f"{paths.shown(FILE)}: {told}")
        return replace(claim, same_as=f"{found[name].short} ({number})")

    ordered = sorted(found.items(), key=lambda entry: (entry[1].ours, entry[0][0] == "f", entry[0]))
    return {name: replace(item, claims=[linked(claim) for claim in item.claims]) for name, item in ordered}


def chosen(profile: Profile, names: Sequence[str]) -> list[Item]:
    """Those named. Raises UserError for a name that is none."""
    known = items(profile)
    for name in names:
        if name not in known:
            raise UserError(f"no item {name!r}{did_you_mean(name, known)} There are {', '.join(known)}")
    return [known[name] for name in names]


def _listed(profile: Profile, name: str, told: Mapping | None = None, **entry: Any) -> Item:
    """An item of configs/reports.yaml; captioners stand there again under each of the profile's token budgets. Raises
    UserError for a key that none of its parts has.
    """
    try:
        rows = [_row(profile, **row) for row in entry["rows"]]
        budgets = profile.prism.token_budgets if entry.get("kind") == "prism" else ()
        entry["rows"] = rows + [
            replace(
                row, label=budget_label(row.label, count), runs=tuple(budget_run(run, count) for run in row.runs),
                paper=None, bound=True, budget=count,
            )
            for row in rows if not row.bound for count in budgets
        ]  # fmt: skip
        entry["claims"] = [_claim(profile, **claim) for claim in entry["claims"]]
        entry["pairs"] = [tuple(pair) for pair in entry["pairs"]]
        if told:
            entry["told"] = told["text"]
            entry["told_pairs"] = {label: tuple(pair) for label, pair in told["pairs"].items()}
        return Item(name, **entry)
    except (TypeError, KeyError) as error:
        raise UserError(f"{paths.shown(FILE)}, item {name}: {error}") from None


def _row(
    profile: Profile, label: str, trained: str | None = None, run: str = experiments.BASE_RUN,
    read_by: str = "prism_reader", paper: str | None = None, bound: bool = False,
) -> Row:  # fmt: skip
    seeds = experiments.seeds_of(profile, trained or experiments.MAIN) if trained or "{seed}" in run else ()
    names = [run_name(trained, seed) if trained else run.format(seed=seed) for seed in seeds] or [run]
    return Row(
        label, tuple(f"prism/{experiments.prism_name(name, read_by)}" for name in names), tuple(seeds),
        tuple(f"rl/{name}" for name in names) if trained else (), paper=(paper,) if paper else None, bound=bound,
    )  # fmt: skip


def budget_label(label: str, count: int) -> str:
    """Label of a row whose captions are cut to so many tokens."""
    return f"{label}, first {count} tokens"


def _claim(profile: Profile, groups: Sequence[str] = (), **more: Any) -> Claim:
    first, second = ([tuple(texts()["groups"][name]) for name in groups] + [(), ()])[:2]
    reason, same_as = _reason(profile, more.pop("not testable", "")), more.pop("same as", "")
    return Claim(benchmarks=first, others=second, not_testable=reason, same_as=same_as, **more)


def _reason(profile: Profile, name: str) -> str:
    """Why statements marked with this name cannot be tested by the profile's models; "" where they can."""
    return about_models(profile).get("not_testable", {}).get(name, "")


def called(profile: Profile, captions: CaptionSet | None) -> str:
    """A caption set as rows name it: after its writer where a stand-in wrote it, else by the paper's name."""
    if captions is None:
        return VANILLA
    ours = texts()["caption_sets"].get(profile.pretraining.further.data, {"called": {}})["called"]
    share = "" if captions.share == 1 else f" x {captions.share:g}"
    return f"{ours.get(captions.name, captions.name)}{share}"


def _of_pretraining(
    name: str, title: str, rows: Sequence[Row], claims: Sequence[Claim], *notes: str,
    told_pairs: Mapping[str, tuple[str, str]], **more: Any,
) -> Item:  # fmt: skip
    """An item of notebook 05: it needs all rows, compares what it states or tells; a guesser stands below."""
    needed, sets_of = [row.label for row in rows], {row.captions[0]: row.paper for row in rows if row.captions}
    pairs = list(dict.fromkeys([*((claim.ours, claim.theirs) for claim in claims), *told_pairs.values()]))
    named = ", ".join(f"{paper[1]} (here: {ours})" for ours, paper in sets_of.items() if paper and paper[1] != ours)
    first = texts()["paper_sets"].format(named=f"In the paper the sets are {named}. " if named else "")
    of_all = {"kind": "pretraining", "notes": [first, *notes], "told_pairs": told_pairs}
    return Item(name, title, [*rows, GUESSER], pairs, needed, claims, **of_all, **more)


def table1(profile: Profile) -> Item:
    """Table 1: every setting of the profile with every caption set."""
    rows, claims, first = [], [], {}
    name = {captions: called(profile, captions) for captions in sets.TABLE_1}
    for setting in profile.pretraining.settings:
        label = {captions: f"{setting}, {text}" for captions, text in name.items()}
        rows += [_pretrained(profile, setting, captions, f"{setting}, ") for captions in sets.TABLE_1]
        first[setting] = label[CAPRL_1M], label[None]
        for theirs in (None, sets.SHAREGPT4V, DENSEFUSION):
            reason = _reason(profile, theirs.name) if theirs else ""
            told = f"{setting}: {name[CAPRL_1M]} are better than {name[theirs] if theirs else 'none'}"
            claims.append(Claim(told, label[CAPRL_1M], label[theirs], not_testable=reason))
        claims.append(Claim(f"{setting}: more of CapRL's pairs are better", label[sets.CAPRL_5M], label[CAPRL_1M]))
    return _of_pretraining(
        "table1", "Table 1: VLMs pretrained on caption sets", rows, claims, figures=["dots"],
        told=f"{name[CAPRL_1M]} against none:", told_pairs=first, paper="table1_pretraining.csv",
    )  # fmt: skip


def table2(profile: Profile) -> Item:
    """Table 2: the same images, captions swapped for CapRL's, in the profile's first setting."""
    setting = profile.pretraining.settings[0]
    swapped = ((sets.CAPRL_SHAREGPT4V, sets.SHAREGPT4V), (sets.CAPRL_DENSEFUSION, DENSEFUSION))
    pairs = {theirs: (called(profile, ours), called(profile, theirs)) for ours, theirs in swapped}
    claims = [
        Claim(f"On the images of {pair[1]}, CapRL's captions are better", *pair, not_testable=_reason(profile, of.name))
        for of, pair in pairs.items()
    ]
    rows = [_pretrained(profile, setting, captions) for captions in sets.TABLE_2]
    return _of_pretraining(
        "table2", "Table 2: the same images, other captions", rows, claims, f"Setting {setting}.", figures=["dots"],
        told="CapRL's captions against", told_pairs={pair[1]: pair for pair in pairs.values()},
        paper="table2_image_sources.csv",
    )  # fmt: skip


def figure4(profile: Profile) -> Item:
    """Figure 4: growing caption sets. Comparisons that Table 1 makes of the same runs are counted there."""
    setting = profile.pretraining.settings[0]
    growing = [*sets.growth_sets(profile.pretraining), *sets.FIGURE_4]
    rows = [_pretrained(profile, setting, captions) for captions in (None, *growing)]
    labels, caprl = [row.label for row in rows[1:]], called(profile, CAPRL_1M)
    none_to_all = {name: (name, VANILLA) for name in (caprl, called(profile, DENSEFUSION))}
    stated = {pair: "{} are better than {}" for pair in zip(labels[1::2], labels[::2], strict=True)}
    stated[none_to_all[caprl]] = "CapRL's pairs are better than none"
    if smaller := [label for label in labels if label.startswith(f"{caprl} x")]:
        stated[caprl, smaller[0]] = "More of CapRL's pairs are better than fewer"
    counted = table1(profile).claims if "table1" in profile.pretraining.items else []
    same = {(claim.ours, claim.theirs): f"table1 ({number})" for number, claim in enumerate(counted, 1)}
    claims = [
        Claim(text.format(*pair), *pair, same_as=same.get(tuple(f"{setting}, {side}" for side in pair), ""))
        for pair, text in stated.items()
    ]
    return _of_pretraining(
        "figure4", "Figure 4: growing caption sets", rows, claims,
        f"Setting {setting}. {texts()['growing_sets']}", texts()["lines_apart"],
        told="no pairs to all:", told_pairs=none_to_all, figures=["sets"],
    )  # fmt: skip


def _pretrained(profile: Profile, setting: str, captions: CaptionSet | None, prefix: str = "") -> Row:
    """A row of Tables 1 and 2 and Figure 4: a setting with a caption set (None: Vanilla)."""
    name, seeds = called(profile, captions), profile.pretraining.seeds
    stages = [training for seed in seeds for training in sets.row_trainings(setting, captions, seed)]
    paper = texts()["settings"].get(setting)
    whole = captions and (called(profile, replace(captions, share=1.0)), f"pretraining/{data.run_name(captions.slug)}")
    return Row(
        f"{prefix}{name}", tuple(f"vqa/{sets.final_name(setting, captions, seed)}" for seed in seeds),
        tuple(seeds),
        tuple(f"pretraining/{t.name}" for t in stages if t.stage == "further"),
        tuple(f"pretraining/{t.name}" for t in stages if t.stage == "sft"),
        whole, (paper, captions.name if captions else VANILLA) if paper else None, setting=setting,
    )  # fmt: skip
