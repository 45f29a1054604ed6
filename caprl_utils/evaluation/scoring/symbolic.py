"""The calls to math-verify, exactly as the authors' scorer makes them, and nothing else.

The version is part of the metric (12% against 12 changes its verdict in 0.9.0), so the one we follow
is pinned here and compared with what is installed; results carry both.
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from caprl_utils.errors import UserError

MATH_VERIFY_VERSION = "0.8.0"  # the last release before the paper (July 2025)


@cache
def math_verify_version() -> str:
    """The installed math-verify version."""
    try:
        return version("math-verify")
    except PackageNotFoundError as error:
        raise UserError(
            f"math-verify is not installed: `pip install math-verify=={MATH_VERIFY_VERSION} "
            "latex2sympy2-extended==1.10.2` (the versions in requirements/main.in)"
        ) from error


def version_record() -> dict[str, Any]:
    """For a result record: the installed version, the pinned one, and a warning where they differ."""
    installed = math_verify_version()
    record: dict[str, Any] = {
        "math_verify": installed,
        "math_verify_pinned": MATH_VERIFY_VERSION,
        "math_verify_matches": installed == MATH_VERIFY_VERSION,
    }
    if installed != MATH_VERIFY_VERSION:
        record["warning"] = (
            f"math-verify {installed} is installed, mode caprl is defined with {MATH_VERIFY_VERSION}: "
            "percentages, units and mixed-case words may be judged otherwise"
        )
    return record


@cache
def _latex_config() -> tuple[Any, ...]:
    from math_verify import LatexExtractionConfig

    return (LatexExtractionConfig(),)


def parse_math(text: str) -> list[Any]:
    """First LaTeX match of `text`: [expression, normalised text], [normalised text] or []."""
    from math_verify import parse

    return parse(text, extraction_config=list(_latex_config()), extraction_mode="first_match")


@lru_cache(maxsize=4096)
def _parsed(text: str) -> tuple[Any, ...]:
    return tuple(parse_math(text))


def parse_math_once(text: str) -> list[Any]:
    """`parse_math`, remembering texts: one gold is compared with the answers from several captions."""
    return list(_parsed(text))


def forget() -> None:
    """Drop the remembered texts."""
    _parsed.cache_clear()


def verify_math(answer: Any, gold: list[Any]) -> bool:
    """math-verify's comparison with the answer in first place, as the authors call it (Q22)."""
    from math_verify import verify

    return verify(answer, gold)
