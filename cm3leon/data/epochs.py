"""Endless shuffled epochs, in which a document is seen as often as its weight says.

A document of weight w is seen floor(w) times in an epoch, and in a share w - floor(w) of the epochs once more: before epoch e it was seen
floor(w e + u) times, where u, from 0 to 1, is derived from ``(seed, id)``. With weight 1 that is once in each. An epoch is the same for any
number of processes, and needs none of those before it.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cm3leon.utils.errors import UserError
from cm3leon.utils.files import read_file

KEPT = 4
"""Epochs whose order is kept: the positions of a task of instruction tuning jump between epochs that follow one another."""


@dataclass(frozen=True)
class Weights:
    """How often each of some documents is seen.

    Attributes:
        values: (N,) float64, the weights, above 0.
        phases: (N,) float64, the u of each document, from 0 to 1.
    """

    values: np.ndarray
    phases: np.ndarray

    @classmethod
    def equal(cls, count: int) -> Weights:
        """Each document once in each epoch."""
        return cls(np.ones(count), np.zeros(count))

    @classmethod
    def of_documents(cls, ids: Sequence[str], by_id: Mapping[str, float], seed: int) -> Weights:
        """The weights of documents, in the order of ``ids``."""
        values = [by_id[name] for name in ids]
        phases = [0.0 if weight.is_integer() else _phase(seed, name) for name, weight in zip(ids, values, strict=True)]
        return cls(np.array(values), np.array(phases))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: np.ndarray) -> Weights:
        """The weights of some of the documents."""
        return Weights(self.values[rows], self.phases[rows])

    def seen_before(self, epoch: int) -> np.ndarray:
        """(N,) int64, how often each document is seen before an epoch."""
        seen: np.ndarray = np.floor(self.values * epoch + self.phases).astype(np.int64)
        return seen


def _phase(seed: int, document_id: str) -> float:
    """From 0 to 1, 1 excluded."""
    return (int.from_bytes(hashlib.sha256(f"{seed} {document_id}".encode()).digest()[:8], "big") >> 11) / 2**53


def read_weights(directory: Path) -> dict[str, float]:
    """The weights in the manifest of ``directory``, by the document's id.

    Raises:
        UserError: if one is not above 0 and finite.
        DamagedFileError: if the manifest is truncated.
    """
    import pyarrow.parquet as pq

    table = read_file(directory / "manifest.parquet", partial(pq.read_table, columns=["id", "weight"]), "cm3leon validate")
    weights = {name: 1.0 if weight is None else weight for name, weight in zip(*table.to_pydict().values(), strict=True)}
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            raise UserError(f"{directory}: the weight of {name} is {weight}; it has to be above 0 and finite: run again cm3leon ingest")
    return weights


class Seen(NamedTuple):
    """What is at a position of the endless epochs.

    Attributes:
        row: of the documents.
        earlier: how often the document was seen before: the number of the epoch, if its weight is 1.
        repeat: how often of these in the same epoch.
    """

    row: int
    earlier: int
    repeat: int


@dataclass(frozen=True)
class _Epoch:
    """Its first position, the row at each of its positions, and how often each of these was in the epoch before."""

    start: int
    rows: np.ndarray
    repeats: np.ndarray


class Epochs:
    """The positions of endless epochs, each with an order that derives from ``(*seeds, epoch)``."""

    def __init__(self, weights: Weights, *seeds: int) -> None:
        self.weights, self.seeds = weights, seeds
        self._kept: dict[int, _Epoch] = {}

    def __getitem__(self, position: int) -> Seen:
        number = next((number for number, kept in self._kept.items() if 0 <= position - kept.start < len(kept.rows)), None)
        if number is None:
            number = self._number_of(position)
            self._kept = {**dict(list(self._kept.items())[1 - KEPT :]), number: self._make(number)}
        epoch = self._kept[number]
        row, repeat = int(epoch.rows[position - epoch.start]), int(epoch.repeats[position - epoch.start])
        earlier = int(self.weights.values[row] * number + self.weights.phases[row]) + repeat
        return Seen(row, earlier, repeat)

    def _number_of(self, position: int) -> int:
        """The epoch of a position: the last that starts at it or before."""
        most = int((position + len(self.weights)) / self.weights.values.sum()) + 2
        return bisect_right(range(most), position, key=self._start) - 1

    def _start(self, number: int) -> int:
        return int(self.weights.seen_before(number).sum())

    def _make(self, number: int) -> _Epoch:
        before = self.weights.seen_before(number)
        counts = self.weights.seen_before(number + 1) - before
        rows = np.repeat(np.arange(len(counts)), counts)
        repeats = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        order = np.random.default_rng((*self.seeds, number)).permutation(len(rows))
        return _Epoch(int(before.sum()), rows[order], repeats[order].astype(np.int32))
