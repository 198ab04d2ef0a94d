"""Training samples made ahead of the steps that need them, by worker processes, so that a GPU does not wait for them."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cm3leon.data.batches import Stream
from cm3leon.data.sequences import Sample

STEPS_AHEAD = 4
"""Steps whose samples are made ahead."""

MAX_WORKERS = 4
"""Worker processes of a process that trains; each makes some of its rows."""

Drawn = tuple[list[Sample], dict[str, Any]]
"""The samples of a step, and the state of the stream after it."""


def default_workers(device: torch.device) -> int:
    """Worker processes for training on ``device``: none without a GPU, where they would compete with the training for the cores."""
    if device.type != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MAX_WORKERS, cores - 1))


def prefetched(stream: Stream, rows: Sequence[int], steps: range, workers: int) -> Generator[Drawn, None, None]:
    """The samples of some rows in each of ``steps``, in order, and the stream's state after it; the same for any number of workers.

    Close the iterator to end the workers early.
    """
    workers = min(workers, len(rows))
    if not workers:
        for step in steps:
            yield stream.samples(step, rows), stream.state()
        return
    # 1. Every worker makes a share of the rows in every step; the loader takes from the workers in turn.
    loader = DataLoader(
        _Rows(stream, rows, steps),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        prefetch_factor=STEPS_AHEAD,
        worker_init_fn=_leave_signals,
        multiprocessing_context="fork",
    )
    parts = iter(loader)
    for _ in steps:
        # 2. Put the rows of a step together, in their order.
        samples: dict[int, list[Sample]] = {}
        state: dict[str, Any] = {}
        for own, own_state in islice(parts, workers):
            samples |= own
            state |= own_state
        yield [sample for row in rows for sample in samples[row]], state


@dataclass
class _Rows(IterableDataset[Any]):
    """In each worker: its rows' samples by row, and their state, step by step."""

    stream: Stream
    rows: Sequence[int]
    steps: range

    def __iter__(self) -> Iterator[tuple[dict[int, list[Sample]], dict[str, Any]]]:
        worker = get_worker_info()
        assert worker is not None, "only workers iterate"
        own = self.rows[worker.id :: worker.num_workers]
        names = {str(row) for row in own}
        for step in self.steps:
            samples = {row: self.stream.samples(step, [row]) for row in own}
            yield samples, {row: state for row, state in self.stream.state().items() if row in names}


def _unchanged(part: Any) -> Any:
    return part


def _leave_signals(worker: int) -> None:
    """A worker ends when the training ends it: Ctrl-C, which reaches both, is the training's alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
