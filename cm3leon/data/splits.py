"""Splits that share nothing: records linked by group, by an edit, or by near-identical images are in one split.

1. :func:`links_of` and :mod:`cm3leon.data.near_duplicates` say which records are linked.
2. :func:`cm3leon.data.links.linked_rows` joins them into the connected components of the graph of links.
3. :func:`assign_splits` assigns whole components, to the split that their records state or by a hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

from cm3leon.data.links import Link
from cm3leon.data.manifest import SPLITS
from cm3leon.utils.errors import UserError


class SplitError(UserError):
    """The records cannot be divided into train, val and test."""


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


def stated_by_copies(frame: pd.DataFrame) -> pd.Series:
    """The split that each record or one with the same ``pixels`` states, rejected or not: test before val before train; None for none."""
    order = pd.Series({"test": 0, "val": 1, "train": 2})
    stated = frame["split"].map(order).astype(float)
    strictest = stated.groupby(frame["pixels"].fillna(frame["id"])).transform("min")
    return pd.Series([None if np.isnan(number) else order.index[int(number)] for number in strictest], frame.index, dtype=object)


def assign_splits(
    ids: Sequence[str], components: np.ndarray, stated: Sequence[str | None], seed: int, val_fraction: float, test_fraction: float
) -> list[str]:
    """The split of each record: that of its component.

    A component of which a record states test or val is in that split (in test, if records state both). The others are in train, but for
    those drawn for a split that no record states: by a hash of the seed and the component's smallest id, so that the split of a component
    does not change when other records are added.

    Args:
        stated: the split that each record's source states; None: any.

    Raises:
        SplitError: if there are too few components for three splits.
    """
    stated_splits = pd.Series(list(stated), dtype=object)
    grouped = pd.DataFrame({"id": list(ids), "component": components}).groupby("component")
    table = grouped.agg(smallest=("id", "min"), size=("id", "size"))
    drawn = [name for name in ("val", "test") if not (stated_splits == name).any()]

    # 1. What records state: of a component of several splits all is held out.
    split = pd.Series("train", index=table.index)
    for name in ("val", "test"):
        split[np.unique(components[stated_splits == name])] = name
    free = split[split == "train"].index
    if len(free) < 1 + len(drawn):
        raise SplitError(
            f"{len(ids)} accepted records form {len(table)} unrelated components (by group, edits and near-duplicates), of which "
            f"{len(free)} are left for {', '.join(['train', *drawn])}; each of these needs one. Add records, correct the column split, or "
            "lower validate.near_duplicate_distance or near_duplicate_bits, or raise near_duplicate_similarity, if images that differ "
            "enough were joined"
        )

    # 2. Hash each other component to a number in [0, 1), of which val and test each own an interval. A component with more than half of
    # the records that val or test should have stays in train: it alone would decide what is measured.
    table = table.loc[free]
    table["number"] = [int(hashlib.sha256(f"{seed}/{smallest}".encode()).hexdigest()[:16], 16) / 2**64 for smallest in table["smallest"]]
    count = int(table["size"].sum())
    bounds = {"val": (0.0, val_fraction), "test": (val_fraction, val_fraction + test_fraction)}
    for name in drawn:
        low, high = bounds[name]
        small_enough = table["size"] <= max(1.0, 0.5 * (high - low) * count)
        chosen = (table["number"] >= low) & (table["number"] < high) & small_enough
        split[table.index[chosen]] = name

    # 3. A split left empty, with few records, gets the smallest component of the split that has the most components.
    order = table.sort_values(["size", "number", "smallest"]).index
    own = split.loc[free].copy()
    for name in ("train", *drawn):
        if not (own == name).any():
            donor = own.value_counts().reindex(SPLITS, fill_value=0).idxmax()
            own[next(component for component in order if own[component] == donor)] = name
    split.loc[free] = own

    return split.loc[components].tolist()
