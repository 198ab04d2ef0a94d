"""Stored images, decoded ahead of the network that reads them: by worker processes beside a GPU, by threads without one."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cm3leon.data.images import fit_square
from cm3leon.data.manifest import ImageStore
from cm3leon.utils.errors import UserError

THREADS = 2
"""Without worker processes; Pillow decodes and resizes without Python's lock."""
MAX_WORKERS = 16
BATCHES_AHEAD = 2
"""Batches that each worker, or the threads, have ready."""
SAMPLED = 64
"""Images whose decoding is timed."""

Prepare = Callable[[Image.Image], Tensor]
"""Makes of an image what a network reads; the same shape for all."""


@dataclass(frozen=True)
class Square:
    """uint8 (size, size, 3): resized and cropped to a square by :func:`~cm3leon.data.images.fit_square`."""

    size: int

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(fit_square(image, self.size)))


def default_workers(device: torch.device) -> int:
    """Worker processes beside ``device``: a process for each core but one with a GPU; none without, where the network uses all cores."""
    if device.type != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MAX_WORKERS, cores - 1))


def image_batches(
    store: ImageStore, refs: Sequence[str], prepare: Prepare, batch_size: int, workers: int = 0
) -> Generator[Tensor, None, None]:
    """Images in order, prepared and stacked, ``batch_size`` at a time; the same for any number of workers.

    Args:
        workers: processes; 0: threads of this one.

    Raises:
        UserError: if a shard or an image is missing or damaged.
    """
    batches = _Batches(store, [list(refs[start : start + batch_size]) for start in range(0, len(refs), batch_size)], prepare)
    if not workers or len(batches) < 2:
        yield from _by_threads(batches)
        return
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=min(workers, len(batches)),
        collate_fn=_unchanged,
        prefetch_factor=BATCHES_AHEAD,
        worker_init_fn=_leave_signals,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork",
    )
    for found in loader:
        if isinstance(found, str):  # an exception would come back as one of another type, with the worker's traceback
            raise UserError(found)
        yield found


def decoded_per_second(store: ImageStore, refs: Sequence[str], prepare: Prepare, workers: int = 0) -> float:
    """Images a second that this machine decodes: one core's rate on a sample, times the cores that decode; 0 without images."""
    sample = list(refs[:SAMPLED])
    start = time.perf_counter()
    for ref in sample:
        prepare(store.open(ref))
    cores = min(workers or THREADS, len(os.sched_getaffinity(0)))
    return len(sample) * cores / max(time.perf_counter() - start, 1e-9)


def _by_threads(batches: _Batches) -> Iterator[Tensor]:
    ahead: deque[list[Future[Tensor]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for refs in batches.refs:
                ahead.append([pool.submit(batches.one, ref) for ref in refs])
                if len(ahead) > BATCHES_AHEAD:
                    yield torch.stack([future.result() for future in ahead.popleft()])
            while ahead:
                yield torch.stack([future.result() for future in ahead.popleft()])
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass
class _Batches(Dataset[Any]):
    """The batches by number; in a worker an error is returned as its message."""

    store: ImageStore
    refs: list[list[str]]
    prepare: Prepare

    def __len__(self) -> int:
        return len(self.refs)

    def one(self, ref: str) -> Tensor:
        return self.prepare(self.store.open(ref))

    def __getitem__(self, number: int) -> Tensor | str:
        try:
            return torch.stack([self.one(ref) for ref in self.refs[number]])
        except UserError as error:
            return str(error)


def _unchanged(batch: Any) -> Any:
    return batch


def _leave_signals(worker: int) -> None:
    """A worker ends when the stage ends it: Ctrl-C, which reaches both, is the stage's alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
