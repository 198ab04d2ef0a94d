"""Rows that belong together: the connected components of links between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Link = tuple[np.ndarray, np.ndarray]
"""Row numbers, and for each the number of the group that it belongs to; rows of one group are linked. A row may occur several times."""


def linked_rows(links: Sequence[Link], count: int) -> np.ndarray:
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
    return components(np.concatenate([empty, *first]), np.concatenate([empty, *second]), nodes)[:count]


def components(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """Component number of each of ``count`` nodes joined by the edges ``first[i]`` - ``second[i]``."""
    graph = coo_matrix((np.ones(len(first), dtype=np.float32), (first, second)), shape=(count, count))
    return connected_components(graph, directed=False)[1]
