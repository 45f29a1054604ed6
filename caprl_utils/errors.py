"""The one exception for what a user can mend."""


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where (file, row, key), and what to do."""
