"""Rows of one image become one record: many collections have a row for each caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cm3leon.data.manifest import SourceRow

TEXTS = ("licence", "attribution", "source", "group", "long_caption", "instruction", "edited_from", "text_in_image", "split")
"""What a record has one of. Rows that state different ones are not merged."""
LISTS = ("captions", "objects", "questions", "reasoning")


def merge_rows(rows: Sequence[SourceRow]) -> list[SourceRow]:
    """Merge the rows of one image.

    Each row joins the first one before it that it does not contradict: captions and annotations are added, without repetitions. A row that
    contradicts all before it, or has a problem of its own, stays by itself, and ``validate`` finds it to be a ``duplicate``.

    Args:
        rows: in order. The first has read the image, the others have not.
    """
    image = rows[0].image
    merged: list[SourceRow] = []
    for row in rows:
        joined = None if row.problem else next((number for number, other in enumerate(merged) if _agree(other, row)), None)
        if joined is None:
            merged.append(replace(row, image=image, extension=rows[0].extension) if row.image is None else row)
        else:
            merged[joined] = _joined(merged[joined], row)
    return merged


def _agree(one: SourceRow, other: SourceRow) -> bool:
    if one.problem:
        return False
    texts = ((getattr(one, name), getattr(other, name)) for name in TEXTS)
    return all(None in pair or pair[0] == pair[1] for pair in texts) and all(
        one.conditions.get(kind, image) == image for kind, image in other.conditions.items()
    )


def _joined(one: SourceRow, other: SourceRow) -> SourceRow:
    changes: dict[str, Any] = {name: getattr(one, name) if getattr(one, name) is not None else getattr(other, name) for name in TEXTS} | {
        name: [*getattr(one, name), *(item for item in getattr(other, name) if item not in getattr(one, name))] for name in LISTS
    }
    return replace(
        one,
        **changes,
        conditions={**other.conditions, **one.conditions},
        origin=f"{one.origin}, {other.origin.rpartition(' ')[2]}",
        other_keys=[*one.other_keys, other.key],
    )
