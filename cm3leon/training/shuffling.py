"""The order in which a trainer reads its images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np


def shuffled_batches(count: int, size: int, seed: int, first: int = 0) -> Iterator[np.ndarray]:
    """The positions of each step's batch from step ``first`` on, without end.

    A batch depends on the seed and its step alone. Each epoch has an order of its own; its end that does not fill a batch is dropped.

    Args:
        count: images; batches are smaller than ``size`` if there are fewer.
    """
    size = min(size, count)
    epoch, batch = divmod(first, count // size)
    for number in itertools.count(epoch):
        order = np.random.default_rng((seed, number)).permutation(count)
        for start in range(size * batch, count - size + 1, size):
            yield order[start : start + size]
        batch = 0
