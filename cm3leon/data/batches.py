"""Batches of training sequences: which samples a step trains on, and how they lie in its rows.

Two ways, the same interface. :class:`SortedStream` gives each sample a row and pads little, as a group of batches is sorted by length
together. :class:`PackedStream` fills rows of one length with several samples each, which see nothing of one another: for accelerators,
and for samples much shorter than the context.
Row ``b`` of step ``s`` is the same whatever the number of processes, each of which asks for its own rows only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cm3leon.data.sequences import Sample
from cm3leon.sequence.grammar import PAD

SORT_BATCHES = 16
"""Samples of this many batches are sorted by length together, so that little is padded."""

LOOKAHEAD = 16
"""Samples held for each row of a packed batch, to choose from what fits in the room left."""

Draw = Callable[[int, int], Sample]
"""``draw(epoch, row)`` -> a sample."""


@dataclass(frozen=True)
class Batch:
    """Rows of token ids (B, T) int64, padded on the right, and of the same shape, for each token:

    ``weights`` float32, as a target of the loss, 0 on what is not one; ``places`` int64, in its image, from 1, 0 on what is no image
    token; ``tasks`` int64, the number of its sample's task; where several samples share a row, ``samples`` int64, which it belongs to, from
    1, 0 on padding, and ``positions`` int64, where in its sample.
    """

    tokens: Tensor
    weights: Tensor
    places: Tensor
    tasks: Tensor
    samples: Tensor | None = None
    positions: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        values = [getattr(self, field.name) for field in fields(self)]
        return Batch(*(None if value is None else value.to(device, non_blocking=True) for value in values))

    def rows(self, part: slice) -> Batch:
        """Some of the rows, without columns that are padding in all of them where each row is one sample."""
        values = [getattr(self, field.name) for field in fields(self)]
        length = self.tokens.shape[1]
        if self.samples is None:
            length = int((self.tokens[part] != PAD).sum(1).max())
        return Batch(*(None if value is None else value[part, :length] for value in values))


def collate(samples: Sequence[Sample]) -> Batch:
    """One row a sample, padded to the longest. The opening ``<eos>`` is never a target."""
    rows, length = [[sample] for sample in samples], max(len(sample.masked.tokens) for sample in samples)
    return Batch(*_fill(rows, length)[:4])


def pack(rows: Sequence[Sequence[Sample]], length: int) -> Batch:
    """Several samples a row, one behind another, padded to ``length``."""
    return Batch(*_fill(rows, length))


def _fill(rows: Sequence[Sequence[Sample]], length: int) -> tuple[Tensor, ...]:
    shape = (len(rows), length)
    tokens, places, tasks, numbers, positions = (np.full(shape, value, dtype=np.int64) for value in (PAD, 0, 0, 0, 0))
    weights = np.zeros(shape, dtype=np.float32)
    for row, samples in enumerate(rows):
        start = 0
        for number, (masked, weight, _, task) in enumerate(samples, 1):
            part = slice(start, start + len(masked.tokens))
            tokens[row, part], weights[row, part], places[row, part] = masked.tokens, weight, masked.places
            weights[row, start], tasks[row, part] = 0, task
            numbers[row, part], positions[row, part] = number, np.arange(len(masked.tokens))
            start = part.stop
    return tuple(torch.from_numpy(array) for array in (tokens, weights, places, tasks, numbers, positions))


class Stream(Protocol):
    """Batches of an endless stream of shuffled epochs."""

    batch_size: int

    def __call__(self, step: int, rows: Sequence[int] | None = None) -> Batch:
        """Rows of the batch of a step; by default all."""

    def drawn(self, step: int, rows: Sequence[int] | None = None) -> list[list[Sample]]:
        """The samples that stand in those rows."""

    def state(self) -> dict[str, Any]:
        """What JSON must hold to go on from here."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`; that of other processes is merged in beforehand."""


class _Epochs:
    """The documents of endless epochs, each a permutation that derives from seed and epoch."""

    def __init__(self, draw: Draw, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError("no documents to train on")
        self.draw, self.size, self.seed = draw, size, seed
        self._orders: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> Sample:
        epoch, place = divmod(position, self.size)
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = np.random.default_rng((self.seed, 1, epoch)).permutation(self.size)
        return self.draw(epoch, int(self._orders[epoch][place]))


class SortedStream:
    """Batch number ``step`` depends on ``(seed, step)`` alone: it can be asked for in any order, and there is no state to keep.

    Groups of ``SORT_BATCHES`` batches are drawn together, sorted by length and dealt out in random order.
    """

    def __init__(self, draw: Draw, size: int, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed
        self._epochs = _Epochs(draw, size, seed)
        self._group = -1
        self._batches: list[list[Sample]] = []

    def __call__(self, step: int, rows: Sequence[int] | None = None) -> Batch:
        return collate([sample for row in self.drawn(step, rows) for sample in row])

    def drawn(self, step: int, rows: Sequence[int] | None = None) -> list[list[Sample]]:
        group, within = divmod(step, SORT_BATCHES)
        if group != self._group:
            self._group, self._batches = group, self._draw_group(group)
        return [[self._batches[within][row]] for row in (range(self.batch_size) if rows is None else rows)]

    def _draw_group(self, group: int) -> list[list[Sample]]:
        first = group * SORT_BATCHES * self.batch_size
        samples = [self._epochs[position] for position in range(first, first + SORT_BATCHES * self.batch_size)]
        samples.sort(key=lambda sample: len(sample.masked.tokens))
        batches = [samples[i : i + self.batch_size] for i in range(0, len(samples), self.batch_size)]
        order = np.random.default_rng((self.seed, 2, group)).permutation(len(batches))
        return [batches[int(i)] for i in order]

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass


class PackedStream:
    """Rows of ``length`` tokens, filled with whole samples.

    Row ``b`` of a batch of ``B`` is a stream of its own, of the samples at positions b, b + B, b + 2B ... It holds ``LOOKAHEAD`` of them;
    a new row begins with the oldest, then takes the longest that fits in the room left until none does. Nothing is cut and nothing lost.
    Each row must be asked for at every step, in order.
    """

    def __init__(self, draw: Draw, size: int, batch_size: int, seed: int, length: int) -> None:
        self.batch_size, self.length = batch_size, length
        self._epochs = _Epochs(draw, size, seed)
        self._next = dict.fromkeys(range(batch_size), 0)
        self._held: dict[int, dict[int, Sample]] = {row: {} for row in range(batch_size)}

    def __call__(self, step: int, rows: Sequence[int] | None = None) -> Batch:
        return pack(self.drawn(step, rows), self.length)

    def drawn(self, step: int, rows: Sequence[int] | None = None) -> list[list[Sample]]:
        return [self._row(row) for row in (range(self.batch_size) if rows is None else rows)]

    def _row(self, row: int) -> list[Sample]:
        held = self._held[row]
        taken: list[Sample] = []
        room = self.length
        while True:
            while len(held) < LOOKAHEAD:
                held[self._next[row]] = self._epochs[row + self._next[row] * self.batch_size]
                self._next[row] += 1
            fitting = [number for number, sample in held.items() if len(sample.masked.tokens) <= room]
            if not taken:
                chosen = min(held)
                if chosen not in fitting:
                    raise ValueError(f"a sample of {len(held[chosen].masked.tokens)} tokens does not fit in rows of {self.length}")
            elif fitting:
                chosen = max(fitting, key=lambda number: (len(held[number].masked.tokens), -number))
            else:
                return taken
            taken.append(held.pop(chosen))
            room -= len(taken[-1].masked.tokens)

    def state(self) -> dict[str, Any]:
        return {str(row): [self._next[row], *self._held[row]] for row in range(self.batch_size) if self._next[row]}

    def load_state(self, state: dict[str, Any]) -> None:
        for row, (following, *held) in state.items():
            self._next[int(row)] = following
            self._held[int(row)] = {number: self._epochs[int(row) + number * self.batch_size] for number in held}
