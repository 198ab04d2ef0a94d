"""The evaluation record: every score with its interval, what makes it readable, and all that is needed to measure it again."""

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


@dataclass
class Record:
    """``models/evaluation/record.json``.

    Attributes:
        scores: the model's scores.
        intervals: 95 % bootstrap intervals of the scores.
        calibration: the same metrics of known inputs: real images, reconstructions, other records' captions, majority answers.
        contract: what was asked, and how; scores are comparable if their contracts are equal.
        settings: the sections of the parameters with which to evaluate again.
        models: content hashes of the evaluated models.
    """

    scores: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    calibration: dict[str, float] = field(default_factory=dict)
    contract: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, values: Sequence[float] | np.ndarray, resamples: int, seed: int, groups: Sequence[str] | None = None) -> None:
        """Add a score that is a mean over prompts, with its interval; ``groups``: see :func:`bootstrap`."""
        self.scores[name] = float(np.mean(values))
        self.intervals[name] = bootstrap(values, resamples, seed, groups)

    def add_intervals(
        self, names: Sequence[str], statistic: Callable[[np.ndarray], Sequence[float]], count: int, resamples: int, seed: int
    ) -> None:
        """Add intervals of scores that are not means, by bootstrap of ``statistic`` over ``count`` rows.

        A resample has some rows twice, which raises distances. The interval is therefore shifted by the difference of the resamples' mean
        from the score, which must have been added before.
        """
        rng = np.random.default_rng(seed)
        found = np.array([statistic(rng.integers(count, size=count)) for _ in range(resamples)])
        found += np.array([self.scores[name] for name in names]) - found.mean(0)
        for name, (low, high) in zip(names, np.quantile(found, [0.025, 0.975], axis=0).T.tolist(), strict=True):
            self.intervals[name] = (low, high)

    def write(self, directory: Path) -> None:
        """Write ``directory/record.json``, scores rounded to six decimals."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / FILE).write_text(json.dumps(_rounded(asdict(self)), indent=2, sort_keys=True) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Record:
        """Read ``directory/record.json``."""
        return cls.read_file(directory / FILE)

    @classmethod
    def read_file(cls, path: Path) -> Record:
        """Read a record from a file."""
        data = json.loads(path.read_text())
        for part in ("contract", "settings"):  # both repeat sections of the parameters, whose keys may have been renamed
            data[part] = current_names(data.get(part, {}), "")
        data["intervals"] = {name: (low, high) for name, (low, high) in data["intervals"].items()}
        return cls(**data)


def bootstrap(values: Sequence[float] | np.ndarray, resamples: int, seed: int, groups: Sequence[str] | None = None) -> tuple[float, float]:
    """95 % interval of the mean, by resampling prompts with replacement.

    Args:
        groups: the group of each value, such as the image of a question; whole groups are resampled.
    """
    array = np.asarray(values, dtype=np.float64)
    numbers = np.unique(groups, return_inverse=True)[1] if groups is not None else np.arange(len(array))
    sums, counts = np.bincount(numbers, array), np.bincount(numbers)
    picks = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    low, high = np.quantile(sums[picks].sum(axis=1) / counts[picks].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, first 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
