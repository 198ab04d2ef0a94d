"""Stored images, decoded ahead of the network that reads them: by worker processes beside a GPU, by threads without one."""

from __future__ import annotations

import itertools
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cm3leon.data.images import fit_square
from cm3leon.data.manifest import ImageStore
from cm3leon.data.workers import ahead_by_workers
from cm3leon.utils.device import cores, local_processes
from cm3leon.utils.errors import UserError, message_to_user

THREADS = 2
"""Without worker processes; Pillow decodes and resizes without Python's lock."""
MAX_WORKERS = 16
BATCHES_AHEAD = 2
"""Batches that each worker, or the threads, have ready."""
SAMPLED = 64
"""Images whose decoding is timed."""
SHARED_MEMORY = Path("/dev/shm")
"""Through which workers pass their batches, on Linux; 64 MB in a container that is given no more."""

chosen_workers: int | None = None
"""What :func:`default_workers` gives in this process: ``launch.image_workers``; None: by the cores."""

Prepare = Callable[[Image.Image], Tensor]
"""Makes of an image what a network reads; the same shape for all."""


@dataclass(frozen=True)
class Square:
    """uint8 (size, size, 3): resized and cropped to a square by :func:`~cm3leon.data.images.fit_square`."""

    size: int

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(fit_square(image, self.size)))


def default_workers(device: torch.device) -> int:
    """Worker processes beside ``device``, where ``launch.image_workers`` does not say how many.

    A process for each core but one with a GPU; none without, where the network uses all cores.
    """
    if chosen_workers is not None:
        return chosen_workers
    if device.type != "cuda":
        return 0
    return max(1, min(MAX_WORKERS, cores() // local_processes() - 1))


def image_batches(
    store: ImageStore, refs: Sequence[str], prepare: Prepare, batch_size: int, workers: int = 0
) -> Generator[Tensor, None, None]:
    """Images in order, prepared and stacked, ``batch_size`` at a time; see :func:`read_ahead`."""
    batches = [refs[start : start + batch_size] for start in range(0, len(refs), batch_size)]
    yield from read_ahead(store, batches, prepare, min(workers, len(batches)) if len(batches) > 1 else 0)


def read_ahead(store: ImageStore, batches: Iterable[Sequence[str]], prepare: Prepare, workers: int = 0) -> Generator[Tensor, None, None]:
    """The images of each batch of references, prepared and stacked; in order, and the same for any number of workers.

    Args:
        batches: of nearly one size, perhaps without end; :data:`BATCHES_AHEAD` for each worker are drawn before they are needed.
        workers: processes; 0: threads of this one.

    Raises:
        UserError: if a shard or an image is missing or damaged.
    """
    reader, rest = _Reader(store, prepare), iter(batches)
    first = list(itertools.islice(rest, 1))
    batches = itertools.chain(first, rest)
    if workers and first and first[0]:
        workers = _fitting_workers(workers, reader.one(first[0][0]).nbytes * len(first[0]))
    if not workers:
        yield from _by_threads(reader, batches)
        return
    for found in ahead_by_workers(reader, workers, BATCHES_AHEAD, batches):
        if isinstance(found, str):  # an exception would come back as one of another type, with the worker's traceback
            raise UserError(found)
        yield found


def _fitting_workers(workers: int, batch_bytes: int) -> int:
    """As many of the workers as have room for their batches in half of the free shared memory; without room a worker is killed."""
    if not SHARED_MEMORY.is_dir():
        return workers
    fitting = shutil.disk_usage(SHARED_MEMORY).free // (2 * local_processes() * BATCHES_AHEAD * batch_bytes)
    if fitting < workers:
        print(
            f"WARNING: {SHARED_MEMORY} has room for {fitting} of {workers} processes that decode images; "
            "make it larger (docker run --ipc=host, or --shm-size)",
            file=sys.stderr,
            flush=True,
        )
    return min(workers, fitting)


def decoded_per_second(store: ImageStore, refs: Sequence[str], prepare: Prepare, workers: int = 0) -> float:
    """Images a second that this machine decodes: one core's rate on a sample, times the cores that decode; 0 without images."""
    sample = list(refs[:SAMPLED])
    start = time.perf_counter()
    for ref in sample:
        prepare(store.open(ref))
    return len(sample) * min(workers or THREADS, cores()) / max(time.perf_counter() - start, 1e-9)


@dataclass
class _Reader(Dataset[Any]):
    """Batches by the references of their images."""

    store: ImageStore
    prepare: Prepare

    def one(self, ref: str) -> Tensor:
        return self.prepare(self.store.open(ref))

    def __getitem__(self, refs: Sequence[str]) -> Tensor | str:
        """In a worker, where the user's errors are returned as their message."""
        try:
            return torch.stack([self.one(ref) for ref in refs])
        except Exception as error:
            if (message := message_to_user(error)) is None:
                raise
            return message


def _by_threads(reader: _Reader, batches: Iterable[Sequence[str]]) -> Iterator[Tensor]:
    ahead: deque[list[Future[Tensor]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for refs in batches:
                ahead.append([pool.submit(reader.one, ref) for ref in refs])
                if len(ahead) > BATCHES_AHEAD:
                    yield torch.stack([future.result() for future in ahead.popleft()])
            while ahead:
                yield torch.stack([future.result() for future in ahead.popleft()])
        finally:
            pool.shutdown(cancel_futures=True)
