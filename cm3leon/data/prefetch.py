"""Training batches made ahead of the steps that need them, by a worker process, so that a GPU does not wait for them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from torch.utils.data import IterableDataset

from cm3leon.data.batches import Share, Stream, share_of
from cm3leon.data.workers import ahead_by_workers

STEPS_AHEAD = 4
"""Steps whose batches are made ahead."""

Drawn = tuple[Share, dict[str, int]]
"""A process's share of a step, and the state of the stream after it."""


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
    yield from ahead_by_workers(shares, 1, STEPS_AHEAD)
