"""IoU of boxes against counting cells, and of layouts against trying all assignments."""

import itertools

import numpy as np
import pytest

from cm3leon.scenes.layouts import iou, mean_iou


def cells(box):
    grid = np.zeros((20, 20), bool)
    grid[box[1] : box[3], box[0] : box[2]] = True
    return grid


def test_iou_equals_counting_cells():
    rng = np.random.default_rng(0)
    for _ in range(200):
        (x0, x1), (y0, y1), (u0, u1), (v0, v1) = (sorted(rng.choice(21, 2, replace=False).tolist()) for _ in range(4))
        one, other = (x0, y0, x1, y1), (u0, v0, u1, v1)
        intersection = (cells(one) & cells(other)).sum()
        union = (cells(one) | cells(other)).sum()
        assert iou(one, other) == iou(other, one) == pytest.approx(intersection / union)
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_boxes_are_assigned_so_that_the_mean_is_highest():
    rng = np.random.default_rng(1)
    for count in (1, 2, 3):
        asked, found = ([("x", (x, y, x + 4.0, y + 3.0)) for x, y in rng.random((n, 2)) * 6] for n in (count, 3))
        best = max(sum(iou(a[1], f[1]) for a, f in zip(asked, order)) for order in itertools.permutations(found)) / count
        assert mean_iou(asked, found) == pytest.approx(best)


def test_missing_boxes_and_wrong_labels_count_zero():
    box, other = (0.0, 0.0, 4.0, 4.0), (6.0, 6.0, 9.0, 9.0)
    assert mean_iou([("a", box), ("b", other)], [("a", box)]) == 0.5 and mean_iou([("a", box)], []) == 0
    assert mean_iou([("a", box)], [("b", box)]) == 1 and mean_iou([("a", box)], [("b", box)], labeled=True) == 0
    with pytest.raises(ValueError, match="at least one box"):
        mean_iou([], [("a", box)])
