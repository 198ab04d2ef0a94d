"""Errors that the user can correct, and their base class."""


class UserError(ValueError):
    """An error that the user can correct: the message says what is wrong, where, and what to do.

    Commands print the message and exit with status 2; any other exception is a defect of the program and keeps its traceback.
    """


class ConfigError(UserError):
    """A parameter file is unreadable, names an unknown key or holds an impossible value."""
