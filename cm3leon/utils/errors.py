"""The base of every error whose message is for the user."""


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong, where, and what to do.

    Commands print it as one line and exit with status 2; any other exception is a fault of the program and keeps its traceback.
    """
