"""Rows of one image become one record: many collections have a row for each caption, and several tell of the same images."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

from cm3leon.data.manifest import SourceRow

TEXTS = ("licence", "attribution", "source", "group", "long_caption", "instruction", "edited_from", "text_in_image", "split")
"""What a record has one of. Rows that state different ones are not merged."""
LISTS = ("captions", "objects", "questions", "reasoning")
COMPARED = 16
"""Most rows of one image that contradict each other with which another is compared: thousands may name the same placeholder."""
ORIGINS = 15
"""Most rows of a record that its origin names besides the first one."""


def merge_rows(rows: Sequence[SourceRow]) -> list[SourceRow]:
    """Merge the rows of one image.

    Each row joins the first one before it that it does not contradict: captions and annotations are added, without repetitions. A row that
    contradicts all before it (the first :data:`COMPARED` of those that stay by themselves), or has a problem of its own, stays by itself,
    and ``validate`` finds it to be a ``duplicate``.

    Args:
        rows: in order. The first has read the image, the others have not.
    """
    image = rows[0].image
    merged: list[_Merged] = []
    for row in rows:
        joined = None if row.problem else next((record for record in merged[:COMPARED] if record.agrees_with(row)), None)
        if joined is None:
            merged.append(_Merged(replace(row, image=image, extension=rows[0].extension) if row.image is None else row))
        else:
            joined.join(row)
    return [record.record() for record in merged]


class _Merged:
    """A row, and those that joined it: as fast for a placeholder of thousands of rows as for an image with five captions."""

    def __init__(self, row: SourceRow) -> None:
        self._row = replace(row, other_keys=[*row.other_keys], conditions={**row.conditions})
        self._lists: dict[str, list[Any]] = {name: [*getattr(row, name)] for name in LISTS}
        self._known = {name: set(map(repr, items)) for name, items in self._lists.items()}
        self._keys = {row.key, *row.other_keys}
        self._origins: list[str] = []

    def agrees_with(self, other: SourceRow) -> bool:
        """False for a row that contradicts, and for an edit and its original: one that has changed nothing."""
        own = self._row
        if own.problem or other.edited_from in self._keys or own.edited_from in (other.key, *other.other_keys):
            return False
        texts = ((getattr(own, name), getattr(other, name)) for name in TEXTS)
        return all(None in pair or pair[0] == pair[1] for pair in texts) and all(
            own.conditions.get(kind, image) == image for kind, image in other.conditions.items()
        )

    def join(self, other: SourceRow) -> None:
        own = self._row
        for name in TEXTS:
            if getattr(own, name) is None:
                setattr(own, name, getattr(other, name))
        for name, items in self._lists.items():
            items += [item for item in getattr(other, name) if repr(item) not in self._known[name]]
            self._known[name].update(map(repr, getattr(other, name)))
        own.conditions = {**other.conditions, **own.conditions}
        own.weight = max(own.weight, other.weight)
        own.other_keys += [other.key, *other.other_keys]
        self._keys.update((other.key, *other.other_keys))
        self._origins.append(other.origin)

    def record(self) -> SourceRow:
        """The row with all that joined it."""
        first = self._row.origin
        origins = [first]
        for origin in self._origins[:ORIGINS]:
            file, _, place = origin.rpartition(" ")  # "manifest.csv line 3" and "manifest.csv line 5": "manifest.csv line 3, 5"
            origins.append(place if file and first.startswith(f"{file} ") else origin)
        left = len(self._origins) - ORIGINS
        lists: dict[str, Any] = self._lists
        return replace(self._row, **lists, origin=", ".join(origins) + (f" and {left:,} more" if left > 0 else ""))


# --- rows of the same image anywhere in a collection -----------------------------------------------------------------


def merge_images(read: Callable[[], Iterable[SourceRow]]) -> Iterator[SourceRow]:
    """The rows of a collection, of which those with the same image file, byte for byte, are merged by :func:`merge_rows`.

    Two passes: the first keeps the rows whose image an earlier row has, without their images; the second yields each image's first row,
    merged with these. The ``source`` of a record is that of its first row.

    Args:
        read: reads the rows from the first one; the same ones each time.
    """
    seen: set[bytes] = set()
    later: dict[bytes, list[_Stripped]] = {}
    with tempfile.TemporaryFile() as conditions:
        for row in read():
            if row.image is None:
                continue
            content = _digest(row.image)
            if content in seen:
                later.setdefault(content, []).append(_Stripped.of(row, conditions))
            seen.add(content)
        for row in read():
            if row.image is None:
                yield row
                continue
            content = _digest(row.image)
            if content in seen:  # its first row
                seen.remove(content)
                yield from merge_rows([row, *(other.restored(conditions, row.source) for other in later.pop(content, []))])


def _digest(image: bytes) -> bytes:
    return hashlib.sha256(image).digest()


@dataclass(frozen=True)
class _Stripped:
    """A row without the bytes of its image; those of its condition images are in a file: offset and size by kind."""

    row: SourceRow
    places: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, row: SourceRow, file: IO[bytes]) -> _Stripped:
        places = {kind: (file.tell(), file.write(image)) for kind, image in row.conditions.items()}
        return cls(replace(row, image=None, conditions={}), places)

    def restored(self, file: IO[bytes], source: str) -> SourceRow:
        conditions = {}
        for kind, (offset, size) in self.places.items():
            file.seek(offset)
            conditions[kind] = file.read(size)
        return replace(self.row, conditions=conditions, source=source)
