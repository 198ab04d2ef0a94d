"""One run at a time in a working directory: stages write into it, and two runs would delete each other's outputs."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from cm3leon.utils.errors import UserError

LOCK = Path(".cache/run.lock")
"""Locked by the process of a run, whose id it holds. The system releases the lock when the process ends, however it ends."""


class BusyError(UserError):
    """Another run works in this directory."""


@contextmanager
def alone_in_directory(directory: Path = Path()) -> Iterator[None]:
    """Hold a directory, by default the working directory, until the block ends.

    Raises:
        BusyError: if another process holds it.
    """
    lock = directory / LOCK
    lock.parent.mkdir(exist_ok=True)
    with lock.open("a+") as file:
        _lock(file, directory)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _lock(file: TextIO, directory: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        advice = "wait until it has ended, or stop it"
        raise BusyError(f"another run works in {directory.absolute()} (process {file.read() or 'unknown'}); {advice}") from None
