"""The one exception for what a user can mend, and how command lines tell it."""

import difflib
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec

P = ParamSpec("P")


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where (file, row, key), and what to do."""


def nearest(word: str, candidates: Iterable[str]) -> list[str]:
    """The candidate most like `word`; empty when none is near."""
    return difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """The end of a message about an unknown word: "; did you mean X?", or nothing when none is near."""
    close = nearest(word, candidates)
    return f"; did you mean {close[0]}?" if close else ""


def command_line(main: Callable[P, int]) -> Callable[P, int]:
    """Wrap a command line: a UserError becomes its message on stderr and exit status 1, not a traceback."""

    @wraps(main)
    def told(*arguments: P.args, **options: P.kwargs) -> int:
        try:
            return main(*arguments, **options)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    return told
