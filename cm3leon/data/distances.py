"""How far two collections are apart in one property, and what chance explains of it."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

RARE = 0.001
"""How often chance may exceed what it is taken to explain."""


def distance(old: np.ndarray, new: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance: the largest difference of two cumulative distributions, 0 to 1."""
    from scipy.stats import ks_2samp

    return float(ks_2samp(old, new).statistic)


def chance_of_distance(old: int, new: int) -> float:
    """The distance that samples of one distribution and of these sizes exceed in :data:`RARE` cases (Smirnov 1939)."""
    return math.sqrt(-math.log(RARE / 2) / 2 * (1 / old + 1 / new))


def share_distance(old: pd.Series, new: pd.Series) -> float:
    """Total variation distance, 0 to 1: the share of the records that would need another value for both to have the same shares."""
    shares = [values.value_counts(normalize=True) for values in (old, new)]
    return float(shares[0].sub(shares[1], fill_value=0).abs().sum() / 2)
