"""Near-duplicates among images, found by their thumbnails or embeddings.

Two images are near-duplicates if their thumbnails are closer than a distance: the same picture in another size or file format. With hashes,
they also are if few bits of these differ: the same picture made brighter, darker, or of another contrast. The hash is the difference hash
(Krawetz, "Kind of Like That", hackerfactor.com, 2013) of all neighbors in a row and in a column of the thumbnail. Embeddings find what both
miss, such as mirrored and cropped copies.

Shapes: N images, U of them with different thumbnails, D values of a thumbnail or an embedding, H bytes of a hash.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cm3leon.config.schema import ValidateConfig
from cm3leon.data.links import Link, components, linked_rows
from cm3leon.data.thumbnails import SIDE

BLOCK, STRIPE = 1024, 8192
"""Images compared at a time: a block of rows of the distance matrix, of which a stripe of columns is computed."""
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
    """Connected components of the graph that joins any two near-duplicates by thumbnails or hashes.

    Args:
        thumbnails_ND: uint8, of :func:`cm3leon.data.thumbnails.thumbnail_of`.

    Returns:
        Component number of each thumbnail, (N,).
    """
    labels = _close_thumbnails(thumbnails_ND, likeness.distance)
    if likeness.bits is None or len(thumbnails_ND) < 2:
        return labels
    return linked_rows([(np.arange(len(labels)), labels), _same_hash_groups(thumbnails_ND, likeness.bits)], len(labels))


def similar_groups(embeddings_ND: np.ndarray, similarity: float) -> np.ndarray:
    """Connected components of the graph that joins any two images whose embeddings have a cosine greater than ``similarity``.

    Args:
        embeddings_ND: float32, of unit length, so that the cosine c of two is 1 - |a - b|^2 / 2.

    Returns:
        Component number of each image, (N,).
    """
    return _close_groups(embeddings_ND, 2 - 2 * similarity)


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

    Exact: of ``bits + 1`` parts of two such hashes at least one is equal, and FAISS compares all hashes that share a part. A part has bits
    from all over the image: of neighbors most images would share one, a sky or a white background.
    """
    import faiss

    hashes_NH = difference_hashes(thumbnails_ND)
    rows = np.flatnonzero(np.bitwise_count(hashes_NH).sum(axis=1) >= LEAST_BITS)
    mixed = np.argsort(np.arange(HASH_BITS) % (bits + 1), kind="stable")
    mixed_NH = np.packbits(np.unpackbits(hashes_NH[rows], axis=1)[:, mixed], axis=1)
    unique_UH, inverse = np.unique(mixed_NH, axis=0, return_inverse=True)
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


def _close_thumbnails(thumbnails_ND: np.ndarray, distance: float) -> np.ndarray:
    """Component numbers, (N,): connected components of the graph that joins any two thumbnails closer than ``distance``.

    Equal thumbnails are one point. The result is exact: products of centered bytes are whole numbers that float32 holds.
    """
    if distance <= 0:
        return np.arange(len(thumbnails_ND))
    unique_UD, inverse = np.unique(thumbnails_ND, axis=0, return_inverse=True)
    squared_limit = (distance * 255) ** 2 * unique_UD.shape[1]
    points_UD = unique_UD.astype(np.float32)
    points_UD -= 128
    return _close_groups(points_UD, squared_limit)[inverse.reshape(-1)]


def _close_groups(points_ND: np.ndarray, squared_limit: float) -> np.ndarray:
    """Component numbers, (N,): connected components of the graph that joins any two points of a squared distance below ``squared_limit``.

    The result is as if all pairs were compared: a projection onto a unit vector is never longer than the vector itself, so that pairs
    further apart along the first principal component need no comparison (sweep over a sorted projection).

    Args:
        points_ND: float32.
    """
    count = len(points_ND)
    if count < 2:
        return np.arange(count)

    # 1. Sort the points by their projection onto the first principal component, along which they differ most.
    centered_ND = points_ND - points_ND.mean(axis=0)
    projection = points_ND @ np.linalg.eigh(centered_ND.T @ centered_ND)[1][:, -1]
    del centered_ND  # of two million thumbnails 1.5 GB
    order = np.argsort(projection, kind="stable")
    points_ND, projection = points_ND[order], projection[order]

    # 2. Compare each block with the points from its own start to the last one within reach, |a - b|^2 = |a|^2 + |b|^2 - 2ab.
    squares = np.concatenate([(points_ND[start : start + BLOCK] ** 2).sum(axis=1) for start in range(0, count, BLOCK)])
    reach = 1.001 * squared_limit**0.5 + 1e-4 * float(squares.max()) ** 0.5  # the projection is rounded
    edges = _Edges(count)
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        last = int(np.searchsorted(projection, projection[stop - 1] + reach, side="right"))
        for left in range(start, last, STRIPE):
            right = min(left + STRIPE, last)
            products = points_ND[start:stop] @ points_ND[left:right].T
            squared_distances = squares[start:stop, None] + squares[None, left:right] - 2 * products
            one, other = np.nonzero(squared_distances < squared_limit)
            edges.add(one + start, other + left)

    # 3. Connected components, in the order of the points.
    labels = np.empty(count, dtype=np.int64)
    labels[order] = edges.components()
    return labels


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
