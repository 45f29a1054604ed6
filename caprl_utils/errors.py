"""The one exception for what a user can mend, and hints at the word that was meant."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where (file, row, key), and what to do."""


def nearest(word: str, candidates: Iterable[str]) -> list[str]:
    """The candidate that `word` was meant to be, in any case, whole or cut short; empty when none is near."""
    plain = {name.casefold(): name for name in candidates}
    begun = [name for key, name in plain.items() if len(word) > 3 and key.startswith(word.casefold())]
    close = difflib.get_close_matches(word.casefold(), list(plain), n=1, cutoff=0.65)
    return begun if len(begun) == 1 else [plain[name] for name in close]


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """The end of a message about an unknown word: "; did you mean X?", or nothing when none is near."""
    close = nearest(word, candidates)
    return f"; did you mean {close[0]}?" if close else ""
