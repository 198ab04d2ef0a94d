"""The evaluation record: scores with their intervals, calibrations and contract, and what is needed to measure them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.config.renamed import current_names

FILE = "record.json"
DIGITS = 6
"""Decimals to which scores are rounded in the file."""


@dataclass
class Record:
    """The content of ``models/evaluation/record.json``.

    Attributes:
        scores: the model's scores.
        intervals: 95 % bootstrap intervals of scores.
        calibration: the same metrics for known inputs, which tell how to read a score: baselines (captions of other records, majority
            answers) and ceilings (real images, reconstructions).
        contract: what was asked, and how. Records are comparable if their contracts are equal.
        settings: sections of the parameters with which to evaluate again.
        models: content hashes of the evaluated models by path.
    """

    scores: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    calibration: dict[str, float] = field(default_factory=dict)
    contract: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, values: Sequence[float] | np.ndarray, resamples: int, seed: int, groups: Sequence[str] | None = None) -> None:
        """Add a score that is a mean over prompts, and its interval; ``groups`` as in :func:`bootstrap`."""
        self.scores[name] = float(np.mean(values))
        self.intervals[name] = bootstrap(values, resamples, seed, groups)

    def add_intervals(
        self, names: Sequence[str], statistic: Callable[[np.ndarray], Sequence[float]], count: int, resamples: int, seed: int
    ) -> None:
        """Add the intervals of scores that are not means: quantiles of a statistic over bootstrap resamples.

        Args:
            names: scores, which must have been added.
            statistic: the scores of given rows.
            count: number of rows.
        """
        # A resample has some rows twice, which raises distances. So the distribution is shifted such that its mean is the score.
        rng = np.random.default_rng(seed)
        resampled = np.array([statistic(rng.integers(count, size=count)) for _ in range(resamples)])
        resampled += np.array([self.scores[name] for name in names]) - resampled.mean(0)
        for name, (low, high) in zip(names, np.quantile(resampled, [0.025, 0.975], axis=0).T.tolist(), strict=True):
            self.intervals[name] = (low, high)

    def write(self, directory: Path) -> None:
        """Write :data:`FILE` to a directory."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / FILE).write_text(json.dumps(_rounded(asdict(self)), indent=2, sort_keys=True) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Record:
        """Read :data:`FILE` of a directory; raises as :meth:`read_file`."""
        return cls.read_file(directory / FILE)

    @classmethod
    def read_file(cls, path: Path) -> Record:
        """Read a record; parameters that were renamed since it was written have their present names.

        Raises:
            OSError: if the file cannot be read.
            ValueError, KeyError, TypeError: if it is not an evaluation record.
        """
        data = json.loads(path.read_text())
        for section in ("contract", "settings"):  # both repeat sections of the parameters
            data[section] = current_names(data.get(section, {}), "")
        data["intervals"] = {name: (low, high) for name, (low, high) in data["intervals"].items()}
        return cls(**data)


def bootstrap(values: Sequence[float] | np.ndarray, resamples: int, seed: int, groups: Sequence[str] | None = None) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of values, one a prompt (Efron 1979).

    Args:
        resamples: number of bootstrap resamples.
        groups: the group of each value, such as the image of each question; groups are then resampled whole, as their values are not
            independent.
    """
    # The mean of a resample is the sum of its groups' sums over the sum of their counts.
    array = np.asarray(values, dtype=np.float64)
    numbers = np.unique(groups, return_inverse=True)[1] if groups is not None else np.arange(len(array))
    sums, counts = np.bincount(numbers, array), np.bincount(numbers)
    picks = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    low, high = np.quantile(sums[picks].sum(axis=1) / counts[picks].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _rounded(value: Any) -> Any:
    """The same with all floats rounded to :data:`DIGITS` decimals."""
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
