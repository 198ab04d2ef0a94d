"""JSON annotation files, checked entry by entry: what is wrong with one is told by the field that is missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cm3leon.data.cells import parse_json, shown
from cm3leon.data.sources import SourceError


def existing(path: Path, key: str) -> Path:
    """The path of a file that the parameter ``key`` names; SourceError if there is no such file."""
    if not path.is_file():
        raise SourceError(f"{path} does not exist; {key} names it, relative to ingest.path")
    return path


def load_json(path: Path, key: str) -> Any:
    """The content of a JSON file that the parameter ``key`` names.

    Raises:
        SourceError: if it does not exist, or is not JSON.
    """
    try:
        return parse_json(existing(path, key).read_bytes())
    except ValueError as error:
        raise SourceError(f"{path} is not JSON ({error}); download it again") from None


def entries(found: Any, what: str, names: Sequence[str], fields: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A list of objects.

    Args:
        what: the list's name for errors, such as ``"questions.json: 'questions'"``.
        names: fields that each object has, numbers or texts: ids and names of files.
        fields: further ones, with any values.

    Raises:
        SourceError: if it is another thing.
    """
    if not isinstance(found, list):
        raise SourceError(f"{what} is no list of objects with {', '.join([*names, *fields])}, but {shown(found)}")
    for number, item in enumerate(found):
        missing = [name for name in (*names, *fields) if not isinstance(item, dict) or name not in item]
        if missing:
            raise SourceError(f"{what}: entry {number} has no {' and no '.join(map(repr, missing))}")
        for name in names:
            if not isinstance(item[name], (int, str)):
                raise SourceError(f"{what}: entry {number} has a {name!r} that is no number or text, but {shown(item[name])}")
    return found
