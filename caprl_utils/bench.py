"""All benches, and the one writer of their results.

    python -m caprl_utils.bench                  all of them (`make bench`), one table
    python -m caprl_utils.bench client scoring   only these

Each row compares ours with a baseline measured in the same run, or with a limit that we set
(caprl_utils/reports/bench_table.py:TARGETS), and says what was aimed at. Rows go to reports/bench/bench.json (and
.md), merged by name, with the machine and its load: wall times mean little without it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_utils import paths, provenance
from caprl_utils.errors import UserError
from caprl_utils.files import write_atomic, write_json

BENCHES = {
    "client": "caprl_utils.models.bench:bench_client",
    "curation": "caprl_utils.curation.bench:bench_scale",
    "scoring": "caprl_utils.prism.bench:bench_scoring",
    "bootstrap": "caprl_utils.prism.bench:bench_bootstrap",
    "reward": "caprl_utils.rl.bench:bench",
}
"""Name -> function without required arguments that returns one row or several."""

COLUMNS = ("name", "ours", "baseline", "ratio", "goal", "unit", "n")


def results_file() -> Path:
    """Where the rows are kept."""
    return paths.REPORTS / "bench" / "bench.json"


def read() -> list[dict[str, Any]]:
    """The rows recorded so far. Raises UserError for a file that is not ours."""
    file = results_file()
    if not file.exists():
        return []
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return sorted(rows, key=lambda row: row["name"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{paths.shown(file)} is damaged ({error}); restore or delete it") from None


def record(rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to reports/bench/bench.json; a row replaces the one of the same name.

    A row has `name`, `ours`, `baseline`, `ratio` (above 1 is better than the baseline), `goal` (of the ratio),
    `unit`, `n`; the machine, its load and the commit are added here. Raises ValueError for a row without these.
    """
    from caprl_utils.reports.bench_table import bench_markdown

    known = {row["name"]: row for row in read()}
    for row in rows:
        if missing := set(COLUMNS) - set(row):
            raise ValueError(f"bench row {row.get('name')!r} lacks {', '.join(sorted(missing))}")
        known[row["name"]] = {**row, "machine": machine(), "commit": provenance.commit()["commit"]}
    ordered = sorted(known.values(), key=lambda row: row["name"])
    write_json(results_file(), ordered)
    write_atomic(results_file().with_suffix(".md"), bench_markdown(ordered))


def machine() -> str:
    """Processor, cores, GPUs, and the load of the last minute."""
    found = provenance.hardware()
    gpus = f", {', '.join(found['gpus'])}" if found["gpus"] else ""
    return f"{found['cpu']}, {found['cores']} cores{gpus}, load {os.getloadavg()[0]:.1f}"


def run(name: str) -> list[dict[str, Any]]:
    """Run one bench and record its rows."""
    module, _, function = BENCHES[name].partition(":")
    found = getattr(importlib.import_module(module), function)()
    rows = [found] if isinstance(found, dict) else list(found)
    record(rows)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as text, widest name first in width."""
    from caprl_utils.reports.bench_table import three_digits

    if not rows:
        return "no bench has been run"
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'bench':<{width}} {'ours':>10} {'baseline':>10} {'ratio':>7} {'goal':>6}  unit"]
    for row in rows:
        cells = [three_digits(row[key]) for key in ("ours", "baseline", "ratio", "goal")]
        lines.append(
            f"{row['name']:<{width}} {cells[0]:>10} {cells[1]:>10} {cells[2]:>7} {cells[3]:>6}  {row['unit']}"
            f"{_met(row)}"
        )
    return "\n".join(lines)


def _met(row: Mapping[str, Any]) -> str:
    if row["ratio"] is None or row["goal"] is None:
        return ""
    return ", met" if row["ratio"] >= row["goal"] else ", MISSED"


def main(names: Sequence[str]) -> int:
    """Run the named benches (default: all) and print one table; returns 1 when one could not run."""
    if unknown := set(names) - set(BENCHES):
        print(
            f"error: no bench {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}", file=sys.stderr
        )
        return 2
    rows, failed = [], 0
    for name in names or BENCHES:
        print(f"bench {name} ...", file=sys.stderr, flush=True)
        try:
            rows += run(name)
        except UserError as error:
            print(f"error: bench {name}: {error}", file=sys.stderr)
            failed = 1
    print(table(rows))
    print(machine())
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
