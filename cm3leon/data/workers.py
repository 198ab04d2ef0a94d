"""Worker processes that read data ahead of the network."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from multiprocessing import util
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

_AFTER_QUEUES = -1000
"""Exit priority; those of multiprocessing's queues, which a worker still has to empty, are above."""


def ahead_by_workers(dataset: Dataset[Any], workers: int, ahead: int, sampler: Iterable[Any] | None = None) -> DataLoader[Any]:
    """What ``dataset`` gives for each key of ``sampler``, or an iterable one as it comes; in order, made by ``workers`` processes.

    The program's random numbers stay as they are, and Ctrl-C and SIGTERM are the program's alone.

    Args:
        ahead: results that each worker has ready.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_unchanged,
        prefetch_factor=ahead,
        worker_init_fn=_start,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # from which workers are seeded; by default the program's own, whose state would then depend on them
        multiprocessing_context="fork",
    )


def _unchanged(result: Any) -> Any:
    return result


def _start(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to the whole group, it would end the worker before the program's checkpoint
    # A fork inherits what the program's threads do at exit (Prefect sends its logs), which fails in a process without those threads.
    util.Finalize(None, os._exit, args=(0,), exitpriority=_AFTER_QUEUES)
