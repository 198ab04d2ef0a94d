"""Rows of an Arrow table by the ids of their records, made into Python objects when they are read.

As Python objects the columns of a collection take five times the memory and more, in each process, and once more in one that is forked from
it, because who reads an object writes its reference count.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

CACHED = 1 << 14
"""Rows that are kept as Python objects, so that small collections are converted once."""


class RowsById(Mapping[str, dict[str, Any]]):
    """The rows of a table with the column ``id``, in its order; each a dict from column to value, in which null lists are empty."""

    def __init__(self, table: pa.Table) -> None:
        self._batches = table.to_batches()
        self._starts = np.cumsum([0, *map(len, self._batches)])
        self._lists = [field.name for field in table.schema if pa.types.is_list(field.type)]
        self._row_of = {document_id: row for row, document_id in enumerate(table["id"].to_pylist())}
        self._cached = functools.lru_cache(CACHED)(self._read)

    def __getitem__(self, document_id: str) -> dict[str, Any]:
        return self._cached(self._row_of[document_id])

    def __iter__(self) -> Iterator[str]:
        return iter(self._row_of)

    def __len__(self) -> int:
        return len(self._row_of)

    def _read(self, row: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        values: dict[str, Any] = self._batches[number].slice(row - int(self._starts[number]), 1).to_pylist()[0]
        return values | {name: [] for name in self._lists if values[name] is None}
