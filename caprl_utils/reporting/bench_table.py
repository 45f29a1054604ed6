"""The recorded benches as Markdown, for reports/bench/bench.md and the HTML report."""

from collections.abc import Mapping, Sequence
from typing import Any


def bench_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The recorded benches as a Markdown table."""
    heads = ["Bench", "Ours", "Baseline", "Ratio", "Goal", "Unit", "n", "Machine"]
    lines = ["| " + " | ".join(heads) + " |", "| :--- | ---: | ---: | ---: | ---: | :--- | ---: | :--- |"]
    for row in rows:
        figures = [
            "–" if row[key] is None else f"{row[key]:.4g}" for key in ("ours", "baseline", "ratio", "goal")
        ]
        lines.append(
            "| " + " | ".join([row["name"], *figures, row["unit"], f"{row['n']:,}", row["machine"]]) + " |"
        )
    return "\n".join(["# Benches", "", "A ratio above 1 is better than the baseline, measured in the same run.", "",
                      *lines, ""])  # fmt: skip
