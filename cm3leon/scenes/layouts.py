"""How well the boxes found in an image match a requested layout: intersection over union (IoU). All boxes have the same unit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from cm3leon.sequence.tasks import Box


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1), 0 to 1; 0 if both are empty."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    intersection = max(width, 0.0) * max(height, 0.0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - intersection
    return intersection / union if union > 0 else 0.0


def mean_iou(asked: Sequence[tuple[str, Box]], found: Sequence[tuple[str, Box]], labeled: bool = False) -> float:
    """Mean IoU of the requested boxes and the found boxes that are assigned to them, 0 to 1.

    The assignment is one to one and maximizes the mean (Hungarian algorithm); a requested box without a found one counts 0. Found boxes in
    excess cost nothing.

    Args:
        asked: label and box of each requested object.
        found: likewise of each object read from the image.
        labeled: assign only boxes with the same label.

    Raises:
        ValueError: if no box was requested.
    """
    if not asked:
        raise ValueError("a layout needs at least one box")
    overlaps = np.zeros((len(asked), len(found)))
    for row, (label, box) in enumerate(asked):
        for column, (name, other) in enumerate(found):
            overlaps[row, column] = iou(box, other) if not labeled or label == name else 0.0
    rows, columns = linear_sum_assignment(overlaps, maximize=True)
    return float(overlaps[rows, columns].sum() / len(asked))
