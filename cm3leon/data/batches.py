"""Batches of training samples: which samples a step trains on, and how they fill its rows.

Two streams with one interface. :class:`SortedStream` gives each sample a row and needs little padding, because the samples of a group of
batches are sorted by length. :class:`PackedStream` packs several samples into each row of a fixed length, without attention between them:
for accelerators, and for samples much shorter than the context.
Row ``b`` of step ``s`` does not depend on the number of processes; each process asks for its own rows only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cm3leon.data.sequences import Sample
from cm3leon.sequence.grammar import PAD

SORT_BATCHES = 16
"""Batches whose samples are sorted by length together, to pad little."""

LOOKAHEAD = 16
"""Samples buffered for each row of a packed batch, to choose one that fits in the remaining tokens."""

GetSample = Callable[[int, int], Sample]
"""``get_sample(epoch, index)`` returns a sample; the same arguments give the same sample."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, padded on the right. All tensors are (B, T) and int64 but for the weights.

    Attributes:
        tokens: token ids.
        weights: float32, weight of each token as a target of the loss; 0 where it is none.
        image_positions: raster index of each token in its image, from 1; 0 for tokens of no image.
        tasks: number of the task of each token's sample, 0 for none.
        samples: in packed rows, the number of each token's sample, from 1; 0 on padding.
        positions: in packed rows, the position of each token in its sample.
    """

    tokens: Tensor
    weights: Tensor
    image_positions: Tensor
    tasks: Tensor
    samples: Tensor | None = None
    positions: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda value: value.to(device, non_blocking=True))

    def rows(self, part: slice) -> Batch:
        """Some of the rows; unless they are packed, cut to the longest."""
        length = self.tokens.shape[1]
        if self.samples is None:
            length = int((self.tokens[part] != PAD).sum(1).max())
        return self._map(lambda value: value[part, :length])

    def without_targets(self) -> Batch:
        """The same rows as no part of the loss: for a process that has no rows left while others compute theirs."""
        return replace(self, weights=torch.zeros_like(self.weights))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: None if value is None else change(value) for name, value in given.items()}
        return Batch(**changed)


def collate(samples: Sequence[Sample]) -> Batch:
    """One sample per row, padded to the longest. The opening ``<eos>`` is never a target."""
    rows, length = [[sample] for sample in samples], max(len(sample.masked.tokens) for sample in samples)
    return Batch(*_fill(rows, length)[:4])


def pack(rows: Sequence[Sequence[Sample]], length: int) -> Batch:
    """Several samples per row, concatenated and padded to ``length``."""
    return Batch(*_fill(rows, length))


def _fill(rows: Sequence[Sequence[Sample]], length: int) -> tuple[Tensor, ...]:
    shape = (len(rows), length)
    tokens, image_positions, tasks, numbers, positions = (np.full(shape, value, dtype=np.int64) for value in (PAD, 0, 0, 0, 0))
    weights = np.zeros(shape, dtype=np.float32)
    for row, samples in enumerate(rows):
        start = 0
        for number, (masked, weight, _, task) in enumerate(samples, 1):
            part = slice(start, start + len(masked.tokens))
            tokens[row, part], weights[row, part], image_positions[row, part] = masked.tokens, weight, masked.image_positions
            weights[row, start], tasks[row, part] = 0, task
            numbers[row, part], positions[row, part] = number, np.arange(len(masked.tokens))
            start = part.stop
    return tuple(torch.from_numpy(array) for array in (tokens, weights, image_positions, tasks, numbers, positions))


class Stream(Protocol):
    """The batches of an endless sequence of shuffled epochs."""

    batch_size: int

    def __call__(self, step: int, rows: Sequence[int] | None = None) -> Batch:
        """The batch of a step, or some of its rows."""

    def samples(self, step: int, rows: Sequence[int] | None = None) -> list[list[Sample]]:
        """The samples in those rows."""

    def state(self) -> dict[str, Any]:
        """The state from which to resume, as JSON values."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume from :meth:`state`, in which the states of all processes are merged."""


class _Epochs:
    """The samples of endless epochs, each a permutation derived from (seed, epoch)."""

    def __init__(self, get_sample: GetSample, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError("there are no samples to train on")
        self.get_sample, self.size, self.seed = get_sample, size, seed
        self._orders: dict[int, np.ndarray] = {}

    def __getitem__(self, position: int) -> Sample:
        epoch, index = divmod(position, self.size)
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = np.random.default_rng((self.seed, 1, epoch)).permutation(self.size)
        return self.get_sample(epoch, int(self._orders[epoch][index]))


class SortedStream:
    """The batch of a step depends on ``(seed, step)`` alone: steps can be asked for in any order, and there is no state to keep.

    The samples of :data:`SORT_BATCHES` batches are sorted by length, divided into batches, and these are shuffled.
    """

    def __init__(self, get_sample: GetSample, size: int, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed
        self._epochs = _Epochs(get_sample, size, seed)
        self._group = -1
        self._batches: list[list[Sample]] = []

    def __call__(self, step: int, rows: Sequence[int] | None = None) -> Batch:
        return collate([sample for row in self.samples(step, rows) for sample in row])

    def samples(self, step: int, rows: Sequence[int] | None = None) -> list[list[Sample]]:
        group, within = divmod(step, SORT_BATCHES)
        if group != self._group:
            self._group, self._batches = group, self._make_group(group)
        return [[self._batches[within][row]] for row in (range(self.batch_size) if rows is None else rows)]

    def _make_group(self, group: int) -> list[list[Sample]]:
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

    Row ``b`` of a batch of ``B`` reads the samples at positions b, b + B, b + 2B ... and holds :data:`LOOKAHEAD` of them. A new row starts
    with the oldest, then takes the longest one that fits in the remaining tokens until none does. No sample is cut or lost.
    Each row must be asked for at every step, in order.
    """

    def __init__(self, get_sample: GetSample, size: int, batch_size: int, seed: int, length: int) -> None:
        self.batch_size, self.length = batch_size, length
        self._epochs = _Epochs(get_sample, size, seed)
        self._next = dict.fromkeys(range(batch_size), 0)
        self._held: dict[int, dict[int, Sample]] = {row: {} for row in range(batch_size)}

    def __call__(self, step: int, rows: Sequence[int] | None = None) -> Batch:
        return pack(self.samples(step, rows), self.length)

    def samples(self, step: int, rows: Sequence[int] | None = None) -> list[list[Sample]]:
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
