"""Splits that share nothing: records linked by group, by an edit, or by near-identical images are in one split.

1. :func:`links_of` and :func:`near_duplicate_groups` say which records are linked.
2. :func:`linked_rows` joins them into the connected components of the graph of links.
3. :func:`assign_splits` assigns whole components, by a hash of the seed and the component's smallest id.

Shapes: N thumbnails, U of them different, D values of each.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from cm3leon.data.manifest import SPLITS
from cm3leon.utils.errors import UserError

BLOCK, STRIPE = 1024, 8192
"""Thumbnails compared at a time: a block of rows of the distance matrix, of which a stripe of columns is computed."""
MAX_EDGES = 2_000_000
"""Edges kept before they are replaced by a spanning forest."""
Link = tuple[np.ndarray, np.ndarray]
"""Row numbers, and for each the number of the group that it belongs to; rows of one group are linked. A row may occur several times."""


class SplitError(UserError):
    """The records cannot be divided into train, val and test."""


def _components(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """Component number of each of ``count`` nodes joined by the edges ``first[i]`` - ``second[i]``."""
    graph = coo_matrix((np.ones(len(first), dtype=np.float32), (first, second)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def near_duplicate_groups(thumbnails_ND: np.ndarray, distance: float) -> np.ndarray:
    """Connected components of the graph that joins any two thumbnails closer than ``distance``.

    The result is exact, as if all pairs were compared: a projection onto a unit vector is never longer than the vector itself, so that
    pairs further apart along the first principal component need no comparison (sweep over a sorted projection), and products of centered
    bytes are whole numbers that float32 holds.

    Args:
        thumbnails_ND: uint8.
        distance: root mean square difference of values scaled to 0-1; 0 joins nothing.

    Returns:
        Component number of each thumbnail, (N,).
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
    first: list[np.ndarray] = []
    second: list[np.ndarray] = []
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        last = int(np.searchsorted(projection, projection[stop - 1] + reach, side="right"))
        for left in range(start, last, STRIPE):
            right = min(left + STRIPE, last)
            products = points_UD[start:stop] @ points_UD[left:right].T
            squared_distances = squares[start:stop, None] + squares[None, left:right] - 2 * products
            one, other = np.nonzero(squared_distances < squared_limit)
            one, other = one + start, other + left
            keep = one < other
            first.append(one[keep])
            second.append(other[keep])
            if sum(map(len, first)) > MAX_EDGES:  # a collection of near-copies has a quadratic number of edges
                first, second = _spanning_forest(np.concatenate(first), np.concatenate(second), count)

    # 4. Connected components, in the order of the thumbnails.
    labels = np.empty(count, dtype=np.int64)
    labels[order] = _components(np.concatenate(first), np.concatenate(second), count)
    return labels[inverse]


def _spanning_forest(first: np.ndarray, second: np.ndarray, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Fewer edges with the same components: each node is joined to the first one of its component."""
    labels = _components(first, second, count)
    center = np.unique(labels, return_index=True)[1][labels]
    nodes = np.flatnonzero(center != np.arange(count))
    return [center[nodes]], [nodes]


def linked_rows(links: list[Link], count: int) -> np.ndarray:
    """Component number (count,) of rows that any of the links joins, directly or through others.

    The graph has a node for each row and one for each group of each link, and edges from rows to their groups: as many edges as rows that
    are linked, however large the groups.
    """
    first, second, nodes = [], [], count
    for rows, groups in links:
        first.append(rows)
        second.append(nodes + groups)
        nodes += int(groups.max()) + 1 if len(groups) else 0
    empty = np.zeros(0, dtype=np.int64)
    return _components(np.concatenate([empty, *first]), np.concatenate([empty, *second]), nodes)[:count]


def links_of(frame: pd.DataFrame) -> list[Link]:
    """Links by ``group``, by ``edited_from`` (an edit with its original, and with its other edits) and by ``pixels`` (equal images)."""
    rows = np.arange(len(frame))
    links: list[Link] = []
    for columns in (["group"], ["id", "edited_from"], ["pixels"]):
        values = pd.concat([frame[column] for column in columns], ignore_index=True)
        codes = pd.factorize(values.astype(object))[0]
        known = codes >= 0  # null is no group
        links.append((np.tile(rows, len(columns))[known], codes[known]))
    return links


def assign_splits(ids: list[str], components: np.ndarray, seed: int, val_fraction: float, test_fraction: float) -> list[str]:
    """The split of each record: that of its component, by a hash of the seed and the component's smallest id.

    The split of a component therefore does not change when other records are added.

    Raises:
        SplitError: if there are fewer than three components.
    """
    table = pd.DataFrame({"id": ids, "component": components}).groupby("component").agg(smallest=("id", "min"), size=("id", "size"))
    if len(table) < len(SPLITS):
        raise SplitError(
            f"{len(ids)} accepted records form {len(table)} unrelated components (by group, edits and near-duplicates), and train, val and "
            f"test need one each. Add records, or lower validate.near_duplicate_distance if images that differ enough were joined"
        )

    # 1. Hash each component to a number in [0, 1), of which val and test each own an interval. A component with more than half of the
    # records that val or test should have stays in train: it alone would decide what is measured.
    table["number"] = [int(hashlib.sha256(f"{seed}/{smallest}".encode()).hexdigest()[:16], 16) / 2**64 for smallest in table["smallest"]]
    split = pd.Series("train", index=table.index)
    bounds = {"val": (0.0, val_fraction), "test": (val_fraction, val_fraction + test_fraction)}
    for name, (low, high) in bounds.items():
        small_enough = table["size"] <= max(1.0, 0.5 * (high - low) * len(ids))
        split[(table["number"] >= low) & (table["number"] < high) & small_enough] = name

    # 2. A split left empty, with few records, gets the smallest component of the split that has the most components.
    order = table.sort_values(["size", "number", "smallest"]).index
    for name in SPLITS:
        if not (split == name).any():
            donor = split.value_counts().reindex(SPLITS, fill_value=0).idxmax()
            split[next(component for component in order if split[component] == donor)] = name

    return split.loc[components].tolist()
