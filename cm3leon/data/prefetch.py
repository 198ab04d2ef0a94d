"""Training batches made ahead of the steps that need them, by a worker process, so that a GPU does not wait for them."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from cm3leon.data.batches import Share, Stream, share_of

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
    most_rows: int | None

    def __iter__(self) -> Iterator[Drawn]:
        for step in self.steps:
            yield share_of(self.stream, step, self.rank, self.processes, self.most_rows), self.stream.state()


def prefetched(shares: Shares) -> Generator[Drawn, None, None]:
    """Iterate over ``shares`` in a worker process. Close the iterator to end it early."""
    yield from DataLoader(
        shares,
        batch_size=None,
        num_workers=1,
        collate_fn=_unchanged,
        prefetch_factor=STEPS_AHEAD,
        worker_init_fn=_leave_signals,
        multiprocessing_context="fork",
    )


def _unchanged(drawn: Any) -> Any:
    return drawn


def _leave_signals(worker: int) -> None:
    """The worker ends when the training ends it: Ctrl-C, which reaches both, is the training's alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
