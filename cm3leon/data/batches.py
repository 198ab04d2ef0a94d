"""Batches of training samples: which samples a step trains on, and in which parts they are computed.

Two streams with one interface. :class:`SortedStream` gives each sample a row, padded to the longest of a group of batches that is sorted by
length. :class:`PackedStream` fills a budget of tokens with whole samples, which follow one another without padding and without attention
between them: for accelerators.
What row ``b`` of step ``s`` holds does not depend on the number of processes; each process asks for its own rows only.
"""

from __future__ import annotations

import heapq
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

GetSample = Callable[[int, int], Sample]
"""``get_sample(epoch, index)`` returns a sample; the same arguments give the same sample."""


@dataclass(frozen=True)
class Batch:
    """Tokens that are computed at once: rows padded on the right, or one row of packed samples.

    Attributes:
        tokens: (B, T) int64, token ids.
        weights: (B, T) float32, weight of each token as a target of the loss; 0 where it is none.
        image_positions: (B, T) int64, raster index of each token in its image, from 1; 0 for tokens of no image.
        tasks: (B, T) int64, number of the task of each token's sample, 0 for none.
        targets: (N,) int64, the tokens of weight above 0, as indices into the flattened rows; never the first of a sample.
        positions: of packed samples (1, T) int64, the position of each token in its sample.
        cu_seqlens: of packed samples (samples + 1,) int32, where each begins, and where the last ends.
    """

    tokens: Tensor
    weights: Tensor
    image_positions: Tensor
    tasks: Tensor
    targets: Tensor
    positions: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @classmethod
    def of_tokens(cls, tokens_BT: Tensor, image_positions_BT: Tensor | None = None) -> Batch:
        """Unpadded rows of which every token but the first is a target of weight 1."""
        weights_BT = torch.ones(tokens_BT.shape, device=tokens_BT.device)
        weights_BT[:, 0] = 0
        zeros_BT = torch.zeros_like(tokens_BT)
        image_positions_BT = zeros_BT if image_positions_BT is None else image_positions_BT
        return cls(tokens_BT, weights_BT, image_positions_BT, zeros_BT, weights_BT.flatten().nonzero()[:, 0])

    def to(self, device: torch.device) -> Batch:
        def move(value: Tensor) -> Tensor:
            pinned = value.pin_memory() if device.type == "cuda" else value  # only from there a copy does not wait
            return pinned.to(device, non_blocking=True)

        given = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: None if value is None else move(value) for name, value in given.items()}
        return Batch(**moved)

    def without_targets(self) -> Batch:
        """The same tokens as no part of the loss: for a process that has nothing left to compute while others have."""
        return replace(self, weights=torch.zeros_like(self.weights), targets=self.targets[:0])


def collate(samples: Sequence[Sample]) -> Batch:
    """One sample per row, padded to the longest. The opening ``<eos>`` is never a target."""
    length = max(len(sample.masked.tokens) for sample in samples)
    return _fill(samples, [row * length for row in range(len(samples))], (len(samples), length))


def pack(samples: Sequence[Sample]) -> Batch:
    """One row in which samples follow one another. The opening ``<eos>`` of each is never a target."""
    cu_seqlens = np.cumsum([0, *(len(sample.masked.tokens) for sample in samples)])
    batch = _fill(samples, cu_seqlens[:-1].tolist(), (1, int(cu_seqlens[-1])))
    positions = torch.arange(batch.tokens.shape[1]) - torch.from_numpy(np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens)))
    return replace(batch, positions=positions[None], cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)))


def _fill(samples: Sequence[Sample], starts: Sequence[int], shape: tuple[int, int]) -> Batch:
    """A batch of ``shape`` with each sample at its start in the flattened rows, and padding elsewhere."""
    tokens, image_positions, tasks = (np.full(shape, value, dtype=np.int64) for value in (PAD, 0, 0))
    weights = np.zeros(shape, dtype=np.float32)
    for start, (masked, weight, _, task) in zip(starts, samples, strict=True):
        part = slice(start, start + len(masked.tokens))
        tokens.flat[part], weights.flat[part], image_positions.flat[part] = masked.tokens, weight, masked.image_positions
        weights.flat[start], tasks.flat[part] = 0, task
    arrays = (tokens, weights, image_positions, tasks, np.flatnonzero(weights))
    return Batch(*(torch.from_numpy(array) for array in arrays))


class Stream(Protocol):
    """The samples of an endless sequence of shuffled epochs.

    Attributes:
        batch_size: rows of a step.
    """

    batch_size: int

    def samples(self, step: int, rows: Sequence[int] | None = None) -> list[Sample]:
        """The samples of a step, or of some of its rows."""

    def divide(self, samples: Sequence[Sample], most_rows: int | None, parts: int = 1) -> list[Batch]:
        """The micro-batches in which samples are computed: as few as the limit allows, or up to ``parts`` if that is more.

        Args:
            most_rows: limit of a micro-batch; None: no limit.
        """

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
    """The samples of a step depend on ``(seed, step)`` alone: steps can be asked for in any order, and there is no state to keep.

    The samples of :data:`SORT_BATCHES` batches are sorted by length, divided into batches, and these are shuffled.
    """

    def __init__(self, get_sample: GetSample, size: int, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed
        self._epochs = _Epochs(get_sample, size, seed)
        self._group = -1
        self._batches: list[list[Sample]] = []

    def __call__(self, step: int) -> Batch:
        """All rows of a step."""
        return collate(self.samples(step))

    def samples(self, step: int, rows: Sequence[int] | None = None) -> list[Sample]:
        group, within = divmod(step, SORT_BATCHES)
        if group != self._group:
            self._group, self._batches = group, self._make_group(group)
        batch = self._batches[within]
        return batch if rows is None else [batch[row] for row in rows]

    def divide(self, samples: Sequence[Sample], most_rows: int | None, parts: int = 1) -> list[Batch]:
        """See :meth:`Stream.divide`; more micro-batches than needed would only be smaller."""
        rows = most_rows or len(samples)
        return [collate(samples[start : start + rows]) for start in range(0, len(samples), rows)]

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


@dataclass
class _Row:
    """A row of :class:`PackedStream`: samples read, tokens left of its budget, and the next sample, which is longer."""

    read: int = 0
    budget: int = 0
    waiting: Sample | None = None


class PackedStream:
    """Each row is a budget of ``length`` tokens a step, spent on whole samples; what a step leaves of it is added to the next one's.

    Over many steps a row so trains on exactly ``length`` tokens a step, none of them padding. Row ``b`` of ``B`` reads the samples at
    positions b, b + B, b + 2B ...; no sample is cut or lost. Each row must be asked for at every step, in order.

    Args:
        length: at least that of the longest sample.
    """

    def __init__(self, get_sample: GetSample, size: int, batch_size: int, seed: int, length: int) -> None:
        self.batch_size, self.length = batch_size, length
        self._epochs = _Epochs(get_sample, size, seed)
        self._rows = {row: _Row() for row in range(batch_size)}

    def samples(self, step: int, rows: Sequence[int] | None = None) -> list[Sample]:
        return [sample for row in (range(self.batch_size) if rows is None else rows) for sample in self._spend(row)]

    def _spend(self, row: int) -> list[Sample]:
        """The samples of a row's next step."""
        own = self._rows[row]
        own.budget += self.length
        taken: list[Sample] = []
        while True:
            sample = own.waiting or self._epochs[row + own.read * self.batch_size]
            length = len(sample.masked.tokens)
            if length > self.length:
                raise ValueError(f"a sample of {length} tokens does not fit in rows of {self.length}")
            if length > own.budget:
                own.waiting = sample
                return taken
            own.read, own.budget, own.waiting = own.read + 1, own.budget - length, None
            taken.append(sample)

    def divide(self, samples: Sequence[Sample], most_rows: int | None, parts: int = 1) -> list[Batch]:
        """See :meth:`Stream.divide`. The micro-batches have nearly equal numbers of tokens, at most ``most_rows * length``."""
        total = _tokens(samples)
        most = total if most_rows is None else most_rows * self.length
        parts = max(parts, -(-total // most))
        while max(map(_tokens, divided := _divide(samples, parts))) > most:
            parts += 1
        return [pack(part) for part in divided if part]

    def state(self) -> dict[str, Any]:
        return {str(number): [row.read, row.budget] for number, row in self._rows.items() if row.read}

    def load_state(self, state: dict[str, Any]) -> None:
        for number, (read, budget) in state.items():
            self._rows[int(number)] = _Row(read, budget)


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(len(sample.masked.tokens) for sample in samples)


def _divide(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """Divide samples into parts of nearly equal numbers of tokens: each, from the longest on, goes to the part with the fewest."""
    heap: list[tuple[int, int]] = [(0, part) for part in range(parts)]
    divided: list[list[Sample]] = [[] for _ in range(parts)]
    for sample in sorted(samples, key=lambda sample: len(sample.masked.tokens), reverse=True):
        tokens, part = heapq.heappop(heap)
        divided[part].append(sample)
        heapq.heappush(heap, (tokens + len(sample.masked.tokens), part))
    return divided
