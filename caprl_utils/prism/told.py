"""What captions say, against the known facts of their images (ours): told, false, repeated. Rendered images only.

A statement is false where the image shows another value, where it does not show the thing at all, or where it is no
sentence of the world; what is true without an image is neither told nor false. Said twice, it counts twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from caprl_utils.answers import split_sentences
from caprl_utils.prism.statistics import Scores
from caprl_utils.registry import world_of

COLUMNS = ("facts", "told", "statements", "wrong", "not_shown", "garbled", "repeats", "contradictions")
Counts = Mapping[str, Any]  # of one caption: its COLUMNS, and num_tokens


def counts(caption: str | None, meta: Mapping[str, Any]) -> dict[str, int | None]:
    """The `COLUMNS` of one caption; None without a caption, or of an image whose facts are not known.

    facts: of the image; told: of these, told rightly at least once; wrong (value), not_shown, garbled: the three kinds
    of false statements; repeats: statements made before; contradictions: keys with several values.
    """
    world = world_of(meta)
    if world is None or caption is None:
        return dict.fromkeys(COLUMNS)
    said = world.statements(caption)
    kinds = Counter(kind_of(statement, meta) for statement in said)
    different = {statement for statement in said if statement}
    return {
        "facts": len(meta["facts"]), "told": len(different & meta["facts"].items()), "statements": len(said),
        **{kind: kinds[kind] for kind in ("wrong", "not_shown", "garbled")},
        "repeats": len(said) - kinds["garbled"] - len(different),
        "contradictions": sum(many > 1 for many in Counter(key for key, _ in different).values()),
    }  # fmt: skip


def kind_of(statement: tuple[str, str] | None, meta: Mapping[str, Any]) -> str:
    """ "true", or which kind of false: "wrong" value, "not_shown", "garbled"."""
    if statement is None:
        return "garbled"
    key, value = statement
    facts = meta["facts"]
    return "true" if facts.get(key) == value else "wrong" if key in facts else "not_shown"


def sentences(caption: str, meta: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """Each sentence of a caption with its `kind_of`, or "repeat" where its statement was made before; None for one that
    states nothing (the introduction, a cut sentence), and of an image whose facts are not known.
    """
    world, seen, found = world_of(meta), set(), []
    for sentence in split_sentences(caption):
        statement = next(iter(world.statements(sentence)), ()) if world else ()
        kind = None if statement == () else "repeat" if statement in seen else kind_of(statement, meta)
        found.append((sentence, kind))
        seen |= {statement} - {(), None}
    return found


def false(row: Counts) -> int:
    """False statements of a caption, of all kinds."""
    return row["wrong"] + row["not_shown"] + row["garbled"]


@dataclass(frozen=True)
class Measure:
    """One number about captions: the sum of `part` over the sum of `whole` (by default, captions). column: of
    samples.parquet, the source of its numbers. decimals: as printed; None for a share, printed in percent.
    """

    head: str
    column: str
    part: Callable[[Counts], float]
    whole: Callable[[Counts], float] = lambda row: 1
    decimals: int | None = None

    @property
    def share(self) -> bool:
        return self.decimals is None


MEASURES: Mapping[str, Measure] = {
    "told": Measure("Facts told (%)", "told", lambda row: row["told"], lambda row: row["facts"]),
    "statements": Measure("Statements a caption", "statements", lambda row: row["statements"], decimals=1),
    "false share": Measure("False (%)", "wrong", false, lambda row: row["statements"]),
    "false count": Measure("False a caption", "wrong", false, decimals=2),
    "not shown": Measure("Of things not shown (%)", "not_shown", lambda r: r["not_shown"], lambda r: r["statements"]),
    "repeats": Measure("Repeats (%)", "repeats", lambda row: row["repeats"], lambda row: row["statements"]),
    "contradict": Measure("Contradict themselves (%)", "contradictions", lambda row: row["contradictions"] > 0),
    "tokens": Measure("Tokens", "num_tokens", lambda row: row["num_tokens"], decimals=1),
}


def summary(rows: Iterable[Counts]) -> dict[str, float | None]:
    """Every measure over captions with known facts; None where there is nothing to divide by."""
    rows = list(rows)
    sums = {name: (sum(map(m.part, rows)), sum(map(m.whole, rows))) for name, m in MEASURES.items()}
    return {name: part / whole if whole else None for name, (part, whole) in sums.items()}


def by_image(rows: Iterable[Mapping[str, Any]], measure: str, factor: float = 1.0) -> dict[str, Scores]:
    """Benchmark -> (image, image) -> a measure over all captions of the image, times `factor`, for the bootstrap over
    images. rows: of samples.parquet, also of several runs; images without statements or known facts are left out where
    these count.
    """
    found: dict[str, dict[tuple[str, str], dict[Any, Counts]]] = {}
    for row in rows:
        if row["num_tokens" if measure == "tokens" else "facts"] is not None:
            captions = found.setdefault(row["benchmark"], {}).setdefault((row["image_id"],) * 2, {})
            captions[row.get("model"), row["caption_index"]] = row
    how, means = MEASURES[measure], {}
    for name, images in found.items():
        sums = {image: [sum(map(f, rows.values())) for f in (how.part, how.whole)] for image, rows in images.items()}
        means[name] = {image: factor * part / whole for image, (part, whole) in sums.items() if whole}
    return means
