"""Near-duplicates among images, found by their thumbnails.

Two images are near-duplicates if their thumbnails are closer than a distance: the same picture in another size or file format. With hashes,
they also are if few bits of these differ: the same picture made brighter, darker, or of another contrast. The hash is the difference hash
(Krawetz, "Kind of Like That", hackerfactor.com, 2013) of all neighbors in a row and in a column of the thumbnail.

Shapes: N thumbnails, U of them different, D values of each, H bytes of a hash.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cm3leon.config.schema import ValidateConfig
from cm3leon.data.links import Link, components, linked_rows
from cm3leon.data.thumbnails import SIDE

BLOCK, STRIPE = 1024, 8192
"""Thumbnails compared at a time: a block of rows of the distance matrix, of which a stripe of columns is computed."""
MAX_EDGES = 2_000_000
"""Edges kept before they are replaced by a spanning forest."""
HASH_BITS = 2 * SIDE * (SIDE - 1)
CONTRAST = 2
"""Neighbors differ if the brightness of one exceeds the other's by more than this, of 255. Less is noise."""
LEAST_BITS = 12
"""An image with fewer of its bits set has no hash: all images that are flat but for a spot would be alike."""


@dataclass(frozen=True)
class Likeness:
    """When two images are near-duplicates.

    Attributes:
        distance: root mean square difference of thumbnails with values scaled to 0-1, exclusive; 0 joins nothing.
        bits: differing bits of hashes of :data:`HASH_BITS`, inclusive; None: hashes are not compared.
    """

    distance: float
    bits: int | None = None

    @classmethod
    def of(cls, config: ValidateConfig) -> Likeness:
        """As the parameters say."""
        return cls(config.near_duplicate_distance, config.near_duplicate_bits)


def near_duplicate_groups(thumbnails_ND: np.ndarray, likeness: Likeness) -> np.ndarray:
    """Connected components of the graph that joins any two near-duplicates.

    Args:
        thumbnails_ND: uint8, of :func:`cm3leon.data.thumbnails.thumbnail_of`.

    Returns:
        Component number of each thumbnail, (N,).
    """
    labels = _close_groups(thumbnails_ND, likeness.distance)
    if likeness.bits is None or len(thumbnails_ND) < 2:
        return labels
    return linked_rows([(np.arange(len(labels)), labels), _same_hash_groups(thumbnails_ND, likeness.bits)], len(labels))


def difference_hashes(thumbnails_ND: np.ndarray) -> np.ndarray:
    """The difference hash of each thumbnail, uint8 (N, H).

    It has a bit for each two neighbors in a row, then for those in a column, set where the right or lower one is brighter by more than
    :data:`CONTRAST`.
    """
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
    gray_NYX = thumbnails_ND.reshape(-1, SIDE, SIDE, 3).astype(np.float32) @ weights
    across, down = np.diff(gray_NYX, axis=2) > CONTRAST, np.diff(gray_NYX, axis=1) > CONTRAST
    return np.packbits(np.concatenate([across.reshape(-1, HASH_BITS // 2), down.reshape(-1, HASH_BITS // 2)], axis=1), axis=1)


def _same_hash_groups(thumbnails_ND: np.ndarray, bits: int) -> Link:
    """Rows with a hash, and for each the number of the component of hashes that differ in at most ``bits`` bits.

    Exact: of ``bits + 1`` parts of two such hashes at least one is equal, and FAISS compares all hashes that share a part.
    """
    import faiss

    hashes_NH = difference_hashes(thumbnails_ND)
    rows = np.flatnonzero(np.bitwise_count(hashes_NH).sum(axis=1) >= LEAST_BITS)
    unique_UH, inverse = np.unique(hashes_NH[rows], axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    if len(unique_UH) < 2:
        return rows, inverse
    index = faiss.IndexBinaryMultiHash(HASH_BITS, bits + 1, HASH_BITS // (bits + 1))
    index.add(unique_UH)
    edges = _Edges(len(unique_UH))
    for start in range(0, len(unique_UH), BLOCK):
        limits, _, found = index.range_search(unique_UH[start : start + BLOCK], bits + 1)  # exclusive
        counts = (limits[1:] - limits[:-1]).astype(np.int64)
        edges.add(np.repeat(np.arange(start, start + len(counts)), counts), found)
    return rows, edges.components()[inverse]


def _close_groups(thumbnails_ND: np.ndarray, distance: float) -> np.ndarray:
    """Component numbers, (N,): connected components of the graph that joins any two thumbnails closer than ``distance``.

    The result is exact, as if all pairs were compared: a projection onto a unit vector is never longer than the vector itself, so that
    pairs further apart along the first principal component need no comparison (sweep over a sorted projection), and products of centered
    bytes are whole numbers that float32 holds.
    """
    # 1. Equal thumbnails are one point.
    unique_UD, inverse = np.unique(thumbnails_ND, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    count, features = unique_UD.shape
    squared_limit = (distance * 255) ** 2 * features
    if squared_limit <= 0:
        return np.arange(len(thumbnails_ND))
    if count < 2:
        return inverse

    # 2. Sort the points by their projection onto the first principal component, along which they differ most.
    points_UD = unique_UD.astype(np.float32) - 128
    centered_UD = points_UD - points_UD.mean(axis=0)
    projection = points_UD @ np.linalg.eigh(centered_UD.T @ centered_UD)[1][:, -1]
    order = np.argsort(projection, kind="stable")
    points_UD, projection = points_UD[order], projection[order]

    # 3. Compare each block with the points from its own start to the last one within reach, |a - b|^2 = |a|^2 + |b|^2 - 2ab.
    squares = (points_UD**2).sum(axis=1)
    reach = float(np.sqrt(squared_limit)) * 1.001 + 0.1  # the projection is rounded
    edges = _Edges(count)
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        last = int(np.searchsorted(projection, projection[stop - 1] + reach, side="right"))
        for left in range(start, last, STRIPE):
            right = min(left + STRIPE, last)
            products = points_UD[start:stop] @ points_UD[left:right].T
            squared_distances = squares[start:stop, None] + squares[None, left:right] - 2 * products
            one, other = np.nonzero(squared_distances < squared_limit)
            edges.add(one + start, other + left)

    # 4. Connected components, in the order of the thumbnails.
    labels = np.empty(count, dtype=np.int64)
    labels[order] = edges.components()
    return labels[inverse]


class _Edges:
    """Edges among ``count`` nodes.

    A collection of near-copies has quadratically many: beyond :data:`MAX_EDGES` they are replaced by fewer with the same components.
    """

    def __init__(self, count: int) -> None:
        self._count, self._kept = count, 0
        self._first: list[np.ndarray] = []
        self._second: list[np.ndarray] = []

    def add(self, first: np.ndarray, second: np.ndarray) -> None:
        """Add edges; those with ``first >= second`` are left out."""
        keep = first < second
        self._append(first[keep], second[keep])
        if self._kept > MAX_EDGES:  # each node is joined to the first one of its component
            labels = self.components()
            center = np.unique(labels, return_index=True)[1][labels]
            nodes = np.flatnonzero(center != np.arange(self._count))
            self._first, self._second, self._kept = [], [], 0
            self._append(center[nodes], nodes)

    def components(self) -> np.ndarray:
        """Component number of each node, (count,)."""
        empty = np.zeros(0, dtype=np.int64)
        return components(np.concatenate([empty, *self._first]), np.concatenate([empty, *self._second]), self._count)

    def _append(self, first: np.ndarray, second: np.ndarray) -> None:
        self._first.append(first)
        self._second.append(second)
        self._kept += len(first)
