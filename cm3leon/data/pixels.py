"""Images of one size for training: in memory if they fit, else decoded at each access."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cm3leon.data.loading import Square, default_workers, image_batches
from cm3leon.data.manifest import ImageStore
from cm3leon.utils.device import default_device
from cm3leon.utils.progress import progress

MEMORY = 2 << 30
"""Most bytes of pixels that are kept in memory."""
_CHUNK = 256


class ImageSet:
    """Images ``refs`` of a store, each cropped to a square of ``size`` pixels (:func:`fit_square`), indexed like an array."""

    def __init__(self, store: ImageStore, refs: Sequence[str], size: int, memory: int = MEMORY) -> None:
        self.store, self.refs, self.size = store, list(refs), size
        self._pixels: np.ndarray | None = None
        if len(self.refs) * size * size * 3 <= memory:
            self._pixels = self._read_all()

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, positions: np.ndarray | Sequence[int] | slice) -> np.ndarray:
        """uint8 (n, size, size, 3), in the order of ``positions``."""
        if self._pixels is not None:
            return self._pixels[positions]
        return self._read(np.arange(len(self.refs))[positions])

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
