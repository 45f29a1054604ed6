"""The one exception for what a user can mend, and hints at the word that was meant."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where (file, row, key), and what to do."""


def nearest(word: str, candidates: Iterable[str]) -> list[str]:
    """The candidate most like `word`; empty when none is near."""
    return difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """The end of a message about an unknown word: "; did you mean X?", or nothing when none is near."""
    close = nearest(word, candidates)
    return f"; did you mean {close[0]}?" if close else ""
