"""The order in which a trainer reads its images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor


class ShuffledBatches:
    """Endless shuffled batches of positions; the end of an epoch that does not fill a batch is dropped.

    Attributes:
        order: (count,), of the present epoch.
        position: where in it the next batch begins.
    """

    def __init__(self, count: int, size: int, shuffle: Callable[[int], Tensor]) -> None:
        """``shuffle`` makes a random order of ``count`` positions; batches are smaller than ``size`` if there are fewer images."""
        self.size, self._shuffle = min(size, count), shuffle
        self.order, self.position = shuffle(count), 0

    def next(self) -> np.ndarray:
        """The positions of the next batch."""
        if self.position + self.size > len(self.order):
            self.order.copy_(self._shuffle(len(self.order)))
            self.position = 0
        self.position += self.size
        return self.order[self.position - self.size : self.position].numpy()
