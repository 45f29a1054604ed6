"""The one exception for what a user can mend, and how command lines tell it."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

P = ParamSpec("P")


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where (file, row, key), and what to do."""


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
