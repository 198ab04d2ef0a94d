"""Errors that the user can correct, and their base class."""

from __future__ import annotations

import errno
import os
from pathlib import Path

FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "database or disk is full")
READ_ONLY = (os.strerror(errno.EROFS), "readonly database")
"""What the messages of a full and of a read-only disk have in them, whichever library passes them on."""


class UserError(ValueError):
    """An error that the user can correct: the message says what is wrong, where, and what to do.

    Commands print the message and exit with status 2; any other exception is a defect of the program and keeps its traceback.
    """


class ConfigError(UserError):
    """A parameter file is unreadable, names an unknown key or holds an impossible value."""


def advice_about_disk(error: Exception) -> str:
    """What to do if ``error`` is of a full or read-only disk, else ""."""
    if any(text in str(error) for text in FULL):
        return "free some disk space and run it again"
    if any(text in str(error) for text in READ_ONLY):
        return "make the place writable and run it again"
    return ""


def message_to_user(error: Exception) -> str | None:
    """The message of an error on which the user can act without a traceback; None for any other, which is a defect of the program."""
    advice = advice_about_disk(error)
    if advice and advice not in str(error):
        where = "" if getattr(error, "filename", None) else f" in {Path.cwd()}"
        return f"{str(error).splitlines()[0]}{where}; {advice}"
    if advice or isinstance(error, (UserError, FileNotFoundError, IsADirectoryError, PermissionError, ConnectionError)):
        return str(error)
    return None
