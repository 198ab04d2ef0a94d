"""A section of the page, and the rules for its verdicts.

A claim says that one score is higher, or one loss lower, than another. It holds if the 95 % interval of the difference over trainings
excludes 0 on that side, it does not hold if the interval excludes 0 on the other side, and else it is undecided. Trainings are few, so
the intervals are Student's; they are of pairs, as trainings of one seed start from the same weights and see the same samples in one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

Point = tuple[float, float, float, float]
"""A point of a plot: x, y, and the ends of its bar or band."""
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"


@dataclass(frozen=True)
class Finding:
    """A claim as it was measured: the effect, its 95 % interval, and the verdict."""

    claim: str
    effect: float
    low: float
    high: float
    verdict: str

    @property
    def cells(self) -> list[str]:
        """Claim, effect, interval and verdict, as they stand in a table."""
        interval = f"{self.low:+.3f} to {self.high:+.3f}" if np.isfinite(self.low) else "one training only"
        return [self.claim, f"{self.effect:+.3f}", interval, self.verdict]


@dataclass
class Section:
    """A claim of the paper on the page.

    Attributes:
        paper: the claim as the paper makes it.
        findings: what of it was measured here.
        note: how to read the findings.
        table: rows of cells, the header first.
        axes: labels of the plot's x and y axis.
        curves: lines of the plot, name -> points; no plot if empty.
        logarithmic: the axis with a logarithmic scale, ``x`` or ``y``, or neither.
    """

    title: str
    paper: str
    findings: list[Finding]
    note: str
    table: list[list[str]]
    axes: tuple[str, str] = ("", "")
    curves: dict[str, list[Point]] = field(default_factory=dict)
    logarithmic: str = ""


def with_interval(result: dict[str, Any]) -> str:
    """``"0.461 [0.38, 0.55]"``: a mean and its interval."""
    low, high = result["interval"]
    return f"{result['mean']:.3f} [{low:.2f}, {high:.2f}]"


def over_trainings(xs: Sequence[float], scores: np.ndarray) -> list[Point]:
    """Mean and range of scores (trainings, xs) at each x."""
    return list(zip(xs, scores.mean(0).tolist(), scores.min(0).tolist(), scores.max(0).tolist(), strict=True))


def with_range(point: Point) -> str:
    """``"0.461 (0.38 to 0.55)"``: a mean and its range."""
    _, mean, low, high = point
    return f"{mean:.3f} ({low:.2f} to {high:.2f})"


def higher(claim: str, first: ArrayLike, second: ArrayLike) -> Finding:
    """The finding on "the first scores are higher than the second", one score a training; those of one position share a seed or a model."""
    effect, low, high = difference(first, second)
    return Finding(claim, effect, low, high, HOLDS if low > 0 else FAILS if high < 0 else UNDECIDED)


def lower(claim: str, first: ArrayLike, second: ArrayLike) -> Finding:
    """As :func:`higher`, for "the first are lower than the second"."""
    effect, low, high = difference(first, second)
    return Finding(claim, effect, low, high, HOLDS if high < 0 else FAILS if low > 0 else UNDECIDED)


def difference(first: ArrayLike, second: ArrayLike) -> tuple[float, float, float]:
    """The mean of first - second and its 95 % interval by pairs, which is not a number if there is one training only."""
    differences = np.asarray(first, float) - np.asarray(second, float)
    mean = float(differences.mean())
    if len(differences) < 2:
        return mean, float("nan"), float("nan")
    if not np.ptp(differences):
        return mean, mean, mean
    interval = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    return mean, float(interval.low), float(interval.high)


def tokens_to_loss(curve: list[dict[str, float]], name: str, goal: float) -> float | None:
    """Tokens after which a loss has fallen to ``goal``, interpolated between validations; None if it does not.

    Of one that is there at the first validation already, the tokens of that.
    """
    points = [(point["tokens"], point[name]) for point in curve if name in point]
    if points and points[0][1] <= goal:
        return points[0][0]
    for (before, high), (after, low) in zip(points, points[1:], strict=False):
        if low <= goal < high:
            return before + (after - before) * (high - goal) / (high - low)
    return None
