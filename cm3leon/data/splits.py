"""Splits that share nothing: rows linked by group, by an edit, or by near-identical pictures stay together."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from cm3leon.data.manifest import SPLITS
from cm3leon.utils.errors import UserError

BLOCK, STRIPE = 1024, 8192
MAX_EDGES = 2_000_000
Link = tuple[np.ndarray, np.ndarray]
"""Rows, and the number of a thing each of them belongs to: rows with one number are linked."""


class SplitError(UserError):
    """The rows cannot be divided into train, val and test."""


def _components(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """Component number of each of ``count`` nodes joined by edges first[i] - second[i]."""
    graph = coo_matrix((np.ones(len(first), dtype=np.float32), (first, second)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def near_duplicate_groups(thumbnails: np.ndarray, distance: float) -> np.ndarray:
    """Component number (n,) of the graph that joins thumbnails closer than ``distance``, whose components are the same as of all pairs.

    ``thumbnails`` is uint8 (n, features); distance is the root mean square difference of values scaled to 0-1. Exact: products of
    centered bytes are whole numbers that float32 holds. Candidates are limited to a window along the first principal component, where no
    two points can be further apart than in full, and compared block by block, so that memory stays small.
    """
    unique, inverse = np.unique(thumbnails, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    count, features = unique.shape
    limit = (distance * 255) ** 2 * features
    if count < 2 or limit <= 0:
        return inverse if limit > 0 else np.arange(len(thumbnails))
    points = unique.astype(np.float32) - 128
    centered = points - points.mean(axis=0)
    place = points @ np.linalg.eigh(centered.T @ centered)[1][:, -1]
    order = np.argsort(place, kind="stable")
    points, place = points[order], place[order]
    squares = (points**2).sum(axis=1)
    reach = float(np.sqrt(limit)) * 1.001 + 0.1
    first: list[np.ndarray] = []
    second: list[np.ndarray] = []
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        last = int(np.searchsorted(place, place[stop - 1] + reach, side="right"))
        for left in range(start, last, STRIPE):
            right = min(left + STRIPE, last)
            apart = squares[start:stop, None] + squares[None, left:right] - 2 * (points[start:stop] @ points[left:right].T)
            one, other = np.nonzero(apart < limit)
            one, other = one + start, other + left
            keep = one < other
            first.append(one[keep])
            second.append(other[keep])
            if sum(map(len, first)) > MAX_EDGES:  # as few edges with the same components
                first, second = _star(np.concatenate(first), np.concatenate(second), count)
    labels = np.empty(count, dtype=np.int64)
    labels[order] = _components(np.concatenate(first), np.concatenate(second), count)
    return labels[inverse]


def _star(first: np.ndarray, second: np.ndarray, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    labels = _components(first, second, count)
    center = np.unique(labels, return_index=True)[1][labels]
    nodes = np.flatnonzero(center != np.arange(count))
    return [center[nodes]], [nodes]


def linked_rows(links: list[Link], count: int) -> np.ndarray:
    """Component number (count,) of rows that any of the links joins, directly or through others."""
    first, second, nodes = [], [], count
    for rows, things in links:
        first.append(rows)
        second.append(nodes + things)
        nodes += int(things.max()) + 1 if len(things) else 0
    empty = np.zeros(0, dtype=np.int64)
    return _components(np.concatenate([empty, *first]), np.concatenate([empty, *second]), nodes)[:count]


def links_of(frame: pd.DataFrame) -> list[Link]:
    """Links by ``group``, by ``edited_from`` (to the original, and between edits of one) and by equal ``pixels`` (hash of a picture)."""
    rows = np.arange(len(frame))
    links: list[Link] = []
    for columns in (["group"], ["id", "edited_from"], ["pixels"]):
        values = pd.concat([frame[column] for column in columns], ignore_index=True)
        codes = pd.factorize(values.astype(object))[0]
        known = codes >= 0
        links.append((np.tile(rows, len(columns))[known], codes[known]))
    return links


def assign_splits(ids: list[str], components: np.ndarray, seed: int, val_fraction: float, test_fraction: float) -> list[str]:
    """The split of each row: that of its component, drawn from a hash of the seed and the component's smallest id.

    So a split does not change when rows are added elsewhere. A component that holds more than half of the rows val or test should have goes
    to train instead. A split left empty (few rows) is given the smallest component of the split that has most.

    Raises:
        SplitError: if there are fewer than three components.
    """
    table = pd.DataFrame({"id": ids, "component": components}).groupby("component").agg(smallest=("id", "min"), size=("id", "size"))
    if len(table) < len(SPLITS):
        raise SplitError(
            f"{len(ids)} accepted rows form {len(table)} unrelated parts (by group, edits and near duplicates), and train, val and test "
            f"need one each. Add rows, or lower validate.near_duplicate_distance if rows that are different enough were joined"
        )
    table["place"] = [int(hashlib.sha256(f"{seed}/{smallest}".encode()).hexdigest()[:16], 16) / 2**64 for smallest in table["smallest"]]
    split = pd.Series("train", index=table.index)
    bounds = {"val": (0.0, val_fraction), "test": (val_fraction, val_fraction + test_fraction)}
    for name, (low, high) in bounds.items():
        fits = table["size"] <= max(1.0, 0.5 * (high - low) * len(ids))
        split[(table["place"] >= low) & (table["place"] < high) & fits] = name
    order = table.sort_values(["size", "place", "smallest"]).index
    for name in SPLITS:
        if not (split == name).any():
            donor = split.value_counts().reindex(SPLITS, fill_value=0).idxmax()
            split[next(component for component in order if split[component] == donor)] = name
    return split.loc[components].tolist()
