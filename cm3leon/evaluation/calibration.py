"""How a score is read: which way is better, and which calibrations are its baselines and its ceilings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LOWER_IS_BETTER = ("fd_", "kd_")
"""Prefixes of the scores that are better when lower (distances); all others are better when higher."""
BASELINES = ("other_captions", "other_images", "other_layouts", "majority", "unchanged", "left_out", "guess", "bicubic")
CEILINGS = ("real", "reconstructions", "real_halves", "one_reference")
"""Ends of the names of calibrations; what comes before is the score that they calibrate."""


def lower_is_better(metric: str) -> bool:
    """True if a lower score is better."""
    return metric.startswith(LOWER_IS_BETTER)


def calibrations_of(calibration: Mapping[str, float], score: str, ends: Sequence[str]) -> dict[str, float]:
    """The calibrations of a score whose names end as given, by that end."""
    return {end: calibration[f"{score}_{end}"] for end in ends if f"{score}_{end}" in calibration}
