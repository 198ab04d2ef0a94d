"""Files that a stage has written and others read: a damaged one is an error that names it and the command that makes it again."""

from __future__ import annotations

import json
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
