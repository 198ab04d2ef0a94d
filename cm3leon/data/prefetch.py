"""Training batches made ahead of the steps that need them, by a worker process, so that a GPU does not wait for them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from cm3leon.data.batches import Batch, Share, Stream, share_of
from cm3leon.data.workers import ahead_by_workers

STEPS_AHEAD = 4
"""Steps whose batches are made ahead."""

Drawn = tuple[Share, dict[str, int]]
"""A process's share of a step, and the state of the stream after it."""

Arrays = dict[str, np.ndarray | None]
"""The fields of a batch."""


@dataclass
class Shares(IterableDataset[Drawn]):
    """The share of process ``rank`` of ``processes`` in each of ``steps``, in order; see :func:`~cm3leon.data.batches.share_of`."""

    stream: Stream
    steps: range
    rank: int
    processes: int
    most: int | None

    def __iter__(self) -> Iterator[Drawn]:
        for step in self.steps:
            yield share_of(self.stream, step, self.rank, self.processes, self.most), self.stream.state()


def prefetched(shares: Shares) -> Generator[Drawn, None, None]:
    """Iterate over ``shares`` in a worker process. Close the iterator to end it early."""
    for share, batches, state in ahead_by_workers(_Sent(shares), 1, STEPS_AHEAD):
        yield replace(share, micro_batches=[_batch(arrays) for arrays in batches]), state


@dataclass
class _Sent(IterableDataset[tuple[Share, list[Arrays], dict[str, int]]]):
    """Shares on their way to another process, as arrays.

    A tensor would go through shared memory, which a container may have little of, with a file open for each until its step is taken: more
    than a process may have open, for the many micro-batches of a large step. Arrays are copied through the pipe.
    """

    shares: Shares

    def __iter__(self) -> Iterator[tuple[Share, list[Arrays], dict[str, int]]]:
        for share, state in self.shares:
            yield replace(share, micro_batches=[]), [_arrays(batch) for batch in share.micro_batches], state


def _arrays(batch: Batch) -> Arrays:
    given = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: None if value is None else value.numpy() for name, value in given.items()}


def _batch(arrays: Arrays) -> Batch:
    tensors: dict[str, Any] = {name: None if value is None else torch.from_numpy(value) for name, value in arrays.items()}
    return Batch(**tensors)
