"""Images of one size for training: in memory if they fit, else decoded when they are read, by :func:`batches_of` ahead of that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from cm3leon.data.loading import Square, decoded_per_second, default_workers, image_batches, read_ahead
from cm3leon.data.manifest import ImageStore
from cm3leon.utils.device import default_device
from cm3leon.utils.progress import progress

MEMORY = 2 << 30
"""Most bytes of pixels that are kept in memory."""
_CHUNK = 64


class Images(Protocol):
    """uint8 images (n, H, W, 3) by an array of positions: a numpy array, or an :class:`ImageSet`."""

    def __len__(self) -> int: ...
    def __getitem__(self, positions: np.ndarray, /) -> np.ndarray: ...


class ImageSet:
    """Images ``refs`` of a store, each cropped to a square of ``size`` pixels (:func:`fit_square`), indexed like an array."""

    def __init__(self, store: ImageStore, refs: Sequence[str], size: int, memory: int = MEMORY) -> None:
        self.store, self.refs, self.size = store, list(refs), size
        self._pixels: np.ndarray | None = None
        if len(self.refs) * size * size * 3 <= memory:
            self._pixels = self._read_all()

    def __len__(self) -> int:
        return len(self.refs)

    @property
    def in_memory(self) -> bool:
        """Whether all were decoded at the start."""
        return self._pixels is not None

    def __getitem__(self, positions: np.ndarray | Sequence[int] | slice) -> np.ndarray:
        """uint8 (n, size, size, 3), in the order of ``positions``."""
        if self._pixels is not None:
            return self._pixels[positions]
        return self._read(np.arange(len(self.refs))[positions])

    def decoded_per_second(self) -> dict[str, float]:
        """What this machine decodes beside a training, as a metric (:func:`~cm3leon.data.loading.decoded_per_second`); none in memory."""
        if self.in_memory:
            return {}
        workers = default_workers(default_device())
        return {"decoded_per_second": decoded_per_second(self.store, self.refs, Square(self.size), workers)}

    def _read(self, positions: np.ndarray) -> np.ndarray:
        refs = [self.refs[position] for position in positions.tolist()]
        found = [batch.numpy() for batch in image_batches(self.store, refs, Square(self.size), _CHUNK)]
        return np.concatenate(found) if found else np.zeros((0, self.size, self.size, 3), dtype=np.uint8)

    def _read_all(self) -> np.ndarray:
        pixels = np.empty((len(self.refs), self.size, self.size, 3), dtype=np.uint8)
        done = 0
        with progress("reading images", len(self.refs), "images") as meter:
            for batch in image_batches(self.store, self.refs, Square(self.size), _CHUNK, default_workers(default_device())):
                pixels[done : done + len(batch)] = batch.numpy()
                done += len(batch)
                meter.advance(len(batch))
        return pixels


def batches_of(images: Images, positions: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """``images[p]`` for each ``p`` of ``positions``; those of an :class:`ImageSet` that is not in memory are decoded ahead.

    Args:
        positions: perhaps without end. They are drawn ahead too, so that they must not depend on what is done with the batches.
    """
    if not isinstance(images, ImageSet) or images.in_memory:
        yield from (images[drawn] for drawn in positions)
        return
    refs = ([images.refs[position] for position in drawn.tolist()] for drawn in positions)
    for batch in read_ahead(images.store, refs, Square(images.size), default_workers(default_device())):
        yield batch.numpy()
