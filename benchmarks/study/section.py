"""A section of the page, and the rules for its verdict.

A claim holds if all seeds agree, if intervals do not overlap, or if the paired difference over prompts has an interval above 0. Otherwise
the verdict is "undecided".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.study.runs import RESAMPLES
from cm3leon.evaluation.record import bootstrap

HOLDS, FAILS, UNDECIDED = "holds here", "does not hold here", "undecided here"


@dataclass
class Section:
    """A claim on the page.

    Attributes:
        paper: the claim as the paper makes it.
        verdict: sentences that say whether it holds here.
        table: rows of cells, the header first.
        axes: labels of the plot's x and y axis.
        curves: lines of the plot, name -> points (x, y, low, high); no plot if empty.
        logarithmic: the axis with a logarithmic scale, ``x`` or ``y``, or neither.
    """

    title: str
    paper: str
    verdict: str
    table: list[list[str]]
    axes: tuple[str, str] = ("", "")
    curves: dict[str, list[tuple[float, float, float, float]]] = field(default_factory=dict)
    logarithmic: str = ""


def with_interval(result: dict[str, Any]) -> str:
    """``"0.461 [0.38, 0.55]"``: a mean and its interval."""
    low, high = result["interval"]
    return f"{result['mean']:.3f} [{low:.2f}, {high:.2f}]"


def every_seed_higher(first: Sequence[float], second: Sequence[float]) -> str:
    """The verdict on "first is higher than second", one score a seed: it holds if every score of the first is above all of the second.

    Seeds are too few for an interval, so this stricter rule decides.
    """
    if min(first) > max(second):
        return HOLDS
    return FAILS if max(first) < min(second) else f"{UNDECIDED} (the seeds overlap)"


def every_seed_lower(first: Sequence[float], second: Sequence[float]) -> str:
    """The verdict on "first is lower than second", for losses."""
    return every_seed_higher([-loss for loss in first], [-loss for loss in second])


def paired_difference(first: Sequence[float], second: Sequence[float]) -> str:
    """The verdict on "first is higher than second", scores of the same prompts, by the 95 % interval of the mean difference.

    Pairing removes what is common to both: that some prompts are harder than others.
    """
    difference = np.asarray(first) - np.asarray(second)
    low, high = bootstrap(difference, RESAMPLES, 0)
    verdict = HOLDS if low > 0 else FAILS if high < 0 else UNDECIDED
    return f"{verdict} ({difference.mean():+.3f} [{low:+.2f}, {high:+.2f}])"


def tokens_to_loss(curve: Sequence[dict[str, float]], name: str, goal: float) -> float | None:
    """Tokens after which a loss has fallen to ``goal``, interpolated between validations; None if it does not."""
    points = [(point["tokens"], point[name]) for point in curve if name in point]
    for (before, high), (after, low) in zip(points, points[1:], strict=False):
        if low <= goal < high:
            return before + (after - before) * (high - goal) / (high - low)
    return None
