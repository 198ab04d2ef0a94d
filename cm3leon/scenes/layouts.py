"""Intersection over union of the boxes that a layout asks for and the boxes found in an image. All boxes share one unit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from cm3leon.sequence.tasks import Box


def iou(one: Box, other: Box) -> float:
    """Area that two boxes have in common, as a share of what they cover together."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(width, 0.0) * max(height, 0.0)
    covered = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - common
    return common / covered if covered > 0 else 0.0


def mean_iou(asked: Sequence[tuple[str, Box]], found: Sequence[tuple[str, Box]], labeled: bool = False) -> float:
    """Mean over the boxes asked for of the overlap with the found box assigned to each, so that the mean is highest; 0 for a missing one.

    Args:
        labeled: only boxes with the same label can be assigned to one another.

    Raises:
        ValueError: if no box was asked for.
    """
    if not asked:
        raise ValueError("a layout needs at least one box")
    overlaps = np.zeros((len(asked), len(found)))
    for row, (label, box) in enumerate(asked):
        for column, (name, other) in enumerate(found):
            overlaps[row, column] = iou(box, other) if not labeled or label == name else 0.0
    rows, columns = linear_sum_assignment(overlaps, maximize=True)
    return float(overlaps[rows, columns].sum() / len(asked))
