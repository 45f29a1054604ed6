"""Every statement of the paper that its tables and figures carry, and the paper's own numbers for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from caprl_utils.reports import figure4, pretrained, table1, table2
from caprl_utils.reports.ablation_items import ITEMS
from caprl_utils.reports.claims import Claim
from caprl_utils.reports.paper import AVERAGE, paper_values
from caprl_utils.reports.results import ENTRIES
from caprl_utils.reports.table3_claims import CLAIMS
from caprl_utils.schema import Profile

ABLATIONS = ("table4", "table5", "table6", "figure1c", "figure5_left", "figure5_right")
# Settings of configs/vlm_init -> that of the paper's Tables 1 and 2 that they are, or stand for.
SETTINGS = {
    "qwen2.5-3b": "Qwen2.5-3B + Qwen2.5-ViT",
    "mini-qwen-3b": "Qwen2.5-3B + Qwen2.5-ViT",
    "qwen2.5-7b": "Qwen2.5-7B + Qwen2.5-ViT",
    "mini-qwen-7b": "Qwen2.5-7B + Qwen2.5-ViT",
    "internlm2.5-7b-clip": "InternLM2.5-7B + CLIP-ViT-L",
    "mini-internlm-clip": "InternLM2.5-7B + CLIP-ViT-L",
}
COLUMNS = {"seed2k": "SEED", "chartqa": "ChartQA", "chartqapro": "ChartQAPro", "charxiv": "CharXiv",
           "infovqa": "InfoVQA", "mmstar": "MMStar"}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """The statements of one table or figure.

    name: of its report. file: CSV of reports/paper. paper_rows: label of ours -> row of that file.
    """

    name: str
    title: str
    claims: Sequence[Claim]
    file: str | None = None
    paper_rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def paper_means(self, claim: Claim) -> tuple[float, float] | None:
        """The paper's percentages for ours and theirs: printed averages, or means of the claim's benchmarks.

        None where the paper prints none. A claim about gains on two groups of benchmarks gives both gains.
        """
        if self.file is None or claim.kind in ("tokens", "reward"):
            return None
        values = paper_values(self.file)
        ours, theirs = (values.get(self.paper_rows.get(label)) for label in (claim.ours, claim.theirs))
        if ours is None or theirs is None:
            return None
        if claim.kind == "larger gain":
            return tuple(_mean(ours, g) - _mean(theirs, g) for g in (claim.benchmarks, claim.others))
        return _mean(ours, claim.benchmarks), _mean(theirs, claim.benchmarks)


def _mean(row: Mapping[str, float], benchmarks: Sequence[str]) -> float:
    if not benchmarks:
        return row[AVERAGE]
    values = [row[COLUMNS[name]] for name in benchmarks if COLUMNS.get(name) in row]
    return sum(values) / len(values)


def groups(profile: Profile) -> list[Group]:
    """All statements, in the order of the paper's tables, then figures."""
    table3_rows = {entry.label: (entry.paper,) for entry in ENTRIES if entry.paper}
    table3 = Group(
        "table3", "Table 3: caption quality in the Prism framework", CLAIMS, "table3_prism.csv", table3_rows
    )
    ablations = [
        Group(
            item.name, item.title, item.claims, item.paper[0] if item.paper else None,
            {row.label: (row.paper,) for row in item.rows if row.paper},
        )
        for item in ITEMS if item.name in ABLATIONS
    ]  # fmt: skip
    found = [_pretrained(module.item(profile)) for module in (table1, table2, figure4)]
    everything = {group.name: group for group in [*found, table3, *ablations]}
    return [everything[name] for name in sorted(everything, key=lambda name: (name[0] == "f", name))]


def _pretrained(item: pretrained.Item) -> Group:
    rows = {
        row.label: (SETTINGS[row.setting], row.captions.name if row.captions else pretrained.VANILLA)
        for row in item.rows
        if row.setting in SETTINGS
    }
    return Group(item.name, item.title, item.claims, item.paper[0] if item.paper else None, rows)
