"""The calls to math-verify as the authors' scorer makes them, but for the clock of their time limit.

The version is part of the metric (12% against 12 changes its verdict in 0.9.0), so the one we follow
is pinned here and compared with what is installed; results carry both.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from caprl_utils.errors import UserError

LIMIT_SEC = 5.0  # math-verify's default, per parse and per comparison
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


@contextmanager
def _cpu_limit() -> Iterator[None]:
    """math-verify's limit of 5 s, on CPU time instead of the clock; main thread only.

    With the clock, a busy machine changes verdicts: a gold whose parse is stopped scores 1 for every answer
    (Q7). The exception is math-verify's own, so it is handled where its own alarm would be.
    """
    from math_verify.errors import TimeoutException

    def stop(*_: Any) -> None:
        raise TimeoutException("Operation timed out!")

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_SEC)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


@cache
def _silence() -> None:
    """No warning that the clock's limit is off: `_cpu_limit` stands in for it."""
    from math_verify import grader, parser

    grader.TIMEOUT_WARNING_SHOWN = parser.TIMEOUT_WARNING_SHOWN = True


def parse_math(text: str) -> list[Any]:
    """First LaTeX match of `text`: [expression, normalised text], [normalised text] or []."""
    from math_verify import parse
    from math_verify.errors import TimeoutException

    _silence()
    try:
        with _cpu_limit():
            return parse(
                text,
                extraction_config=list(_latex_config()),
                extraction_mode="first_match",
                parsing_timeout=None,
            )
    except TimeoutException:  # fired just after the parse: what math-verify makes of it inside
        return []


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
    from math_verify.errors import TimeoutException

    _silence()
    try:
        with _cpu_limit():
            return verify(answer, gold, timeout_seconds=None)
    except TimeoutException:
        return False
