"""Scoring answers in two modes that are never mixed.

`caprl`     the verdict of the authors' Prism scorer, quirk by quirk, with math-verify 0.8.0.
`standard`  each benchmark's own metric, as the common toolkits compute it.

`python -m caprl_utils.prism.scoring --vectors FILE.jsonl` checks both against test vectors.
"""

from __future__ import annotations

from caprl_utils.prism.scoring.batch import score, score_batch
from caprl_utils.prism.scoring.summary import Summary, summarise
from caprl_utils.prism.scoring.symbolic import version_record
from caprl_utils.prism.scoring.types import Judge, Mode, Row, Score

__all__ = [
    "Judge", "Mode", "Row", "Score", "Summary", "score", "score_batch", "summarise", "version_record",
]  # fmt: skip
