"""Errors a user can cause; the command lines print them as one line and exit with 2."""


class CQError(Exception):
    """Bad usage or bad input. The message names the file, tensor or option and fits on one line."""
