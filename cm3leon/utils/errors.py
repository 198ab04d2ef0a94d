"""The base class of errors that the user can correct."""


class UserError(ValueError):
    """An error that the user can correct: the message says what is wrong, where, and what to do.

    Commands print the message and exit with status 2; any other exception is a defect of the program and keeps its traceback.
    """
