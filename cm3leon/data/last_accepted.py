"""The last manifest that ``validate`` has accepted, in short, so that the next data report can say what has changed since.

It is no output of the stage: DVC deletes those when the stage starts. An output that persists would be left alone, but DVC never restores
such a stage from its cache of runs. So it is a file of the working directory; in a new clone there is nothing to compare with.

The file has a row for each record: ``id``, the columns of :data:`FACTS`, and a hash of each of :data:`CONTENT`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cm3leon.data.manifest import first_caption

FACTS = ("width", "height", "caption_length", "licence", "source")
"""What is compared as a distribution; lengths are those of first captions, characters."""
CONTENT = (
    "captions", "licence", "attribution", "source", "group", "long_caption", "objects", "questions", "reasoning", "instruction",
    "edited_from", "conditions", "text_in_image",
)  # fmt: skip
"""What people write of a record. An image that has changed is another record."""


@dataclass(frozen=True)
class Changes:
    """What became of the records.

    Attributes:
        added, removed: how many.
        changed: how many are said to be something else.
        columns: how many of these differ in each column of :data:`CONTENT` in which any does.
    """

    added: int
    removed: int
    changed: int
    columns: dict[str, int]


def summary_of(accepted: pd.DataFrame) -> pd.DataFrame:
    """The table of this module for the accepted records of a manifest with ``width`` and ``height``."""
    table = accepted[["id", "width", "height", "licence", "source"]].copy()
    table["caption_length"] = np.array([len(first_caption(texts)) for texts in accepted["captions"]], dtype=np.int64)
    for name in CONTENT:
        table[f"{name}_hash"] = np.array([_hash(name, value) for value in accepted[name]], dtype=np.uint64)
    return table


def _hash(name: str, value: Any) -> int:
    if name == "conditions":
        value = [item["kind"] for item in value]  # where their images lie changes with the records before them
    return int.from_bytes(hashlib.sha256(json.dumps(value).encode()).digest()[:8])


def write(path: Path, summary: pd.DataFrame) -> None:
    """Keep the summary of a manifest that was accepted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    summary.to_parquet(part, index=False)
    part.replace(path)


def read(path: Path) -> pd.DataFrame | None:
    """The summary that was kept last; None if there is none, or one of another version of this program, or a damaged one."""
    columns = ["id", *FACTS, *(f"{name}_hash" for name in CONTENT)]
    try:
        return pd.read_parquet(path, columns=columns)
    except (OSError, ValueError, KeyError):  # Arrow's errors are among them
        return None


def changes_between(old: pd.DataFrame, new: pd.DataFrame) -> Changes:
    """What became of the records of one summary in another."""
    both = old.merge(new, on="id", suffixes=("_old", "_new"))
    differs = pd.DataFrame({name: both[f"{name}_hash_old"] != both[f"{name}_hash_new"] for name in CONTENT})
    columns = {name: int(differs[name].sum()) for name in CONTENT if differs[name].any()}
    return Changes(len(new) - len(both), len(old) - len(both), int(differs.any(axis=1).sum()), columns)
