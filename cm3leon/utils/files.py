"""Files that a stage has written and others read: written whole or not at all; a damaged one is an error that says how to make it again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cm3leon.utils.errors import UserError

T = TypeVar("T")


class DamagedFileError(UserError):
    """A file is truncated or has another content than its name tells; the message names the file and the command that makes it again."""


def read_file(path: Path, read: Callable[[Path], T], command: str) -> T:
    """``read(path)``, for readers that say neither which file is at fault nor what to do.

    Args:
        command: makes the file again: ``cm3leon index``.

    Raises:
        DamagedFileError: if the reader fails on the content.
        OSError: if the file does not exist or may not be read.
    """
    try:
        return read(path)
    except (UserError, MemoryError, FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # Arrow, FAISS, NumPy, safetensors and tokenizers each have errors of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DamagedFileError(f"{path} is damaged ({reason}); remove it and run again: {command}") from error


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file: it has the old content or the new one, also after a power failure."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value) + "\n")
    sync(part)
    part.replace(path)


def sync(path: Path) -> None:
    """Bring a file's content, or a directory's names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
