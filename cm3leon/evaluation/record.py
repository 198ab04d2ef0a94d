"""The evaluation record: scores with intervals and outcomes, calibrations, contract, and what is needed to measure them again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cm3leon.config.renamed import current_names

FILE, OUTCOMES = "record.json", "outcomes.parquet"
DIGITS = 6
"""Decimals to which scores and outcomes are rounded in the files."""
TOLERANCE = 1e-5
"""Scores of two records, which are rounded, agree if they differ by less."""
PART_OF_THE_MODEL = ("decoding", "retrieval")
"""Entries of the contract in records of earlier versions. They travel with the bundle: another setting is another model."""
Z_95 = 1.959964
"""Quantile 0.975 of the standard normal distribution."""

Outcomes = dict[str, float]
"""What a score is the mean of: a value for each thing that was asked, by its key. A key is the id of a test record, or ``ID#NUMBER`` where
several things are asked of one record."""


@dataclass
class Record:
    """The content of ``models/evaluation/record.json``, and of ``outcomes.parquet`` next to it.

    Attributes:
        scores: the model's scores.
        intervals: 95 % intervals of scores: Wilson's for shares, else by bootstrap.
        calibration: the same metrics for known inputs, which tell how to read a score: baselines (captions of other records, majority
            answers) and ceilings (real images, reconstructions).
        contract: what was asked, and how. Records are comparable if their contracts are equal.
        settings: sections of the parameters with which to evaluate again.
        models: content hashes of the evaluated models by path.
        seen: ids of test records that the model may have been trained on. Only a model of other data than the present can have some.
        outcomes: for each score that is a mean, the values that it is the mean of.
    """

    scores: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    calibration: dict[str, float] = field(default_factory=dict)
    contract: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    outcomes: dict[str, Outcomes] = field(default_factory=dict)

    def add(self, name: str, outcomes: Outcomes, resamples: int, seed: int, share: bool = False) -> None:
        """Add a score that is a mean of outcomes, and its interval.

        The outcomes of one record are not independent, so records are resampled whole.

        Args:
            share: the outcomes are right or wrong, or parts of right from 0 to 1: the interval is Wilson's, over the number of records.
        """
        values = np.array(list(outcomes.values()))
        groups = [record_of(key) for key in outcomes]
        self.outcomes[name] = outcomes
        self.scores[name] = float(values.mean())
        self.intervals[name] = wilson(values.mean(), len(set(groups))) if share else bootstrap(values, resamples, seed, groups)

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
        """Write :data:`FILE` and :data:`OUTCOMES` to a directory."""
        directory.mkdir(parents=True, exist_ok=True)
        fields = {name: value for name, value in asdict(self).items() if name != "outcomes"}
        (directory / FILE).write_text(json.dumps(_rounded(fields), indent=2, sort_keys=True) + "\n")
        rows = [(score, key, round(value, DIGITS)) for score, values in self.outcomes.items() for key, value in values.items()]
        columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], []]
        types = {"score": pa.string(), "key": pa.string(), "value": pa.float64()}
        arrays = {name: pa.array(column, type) for (name, type), column in zip(types.items(), columns, strict=True)}
        pq.write_table(pa.table(arrays), directory / OUTCOMES)

    @classmethod
    def read(cls, directory: Path) -> Record:
        """Read :data:`FILE` of a directory; raises as :meth:`read_file`."""
        return cls.read_file(directory / FILE)

    @classmethod
    def read_file(cls, path: Path) -> Record:
        """Read a record; parameters that were renamed since it was written have their present names.

        Outcomes are read from :data:`OUTCOMES` in the same directory; records of earlier versions have none.

        Raises:
            OSError: if the file cannot be read.
            ValueError, KeyError, TypeError: if it is not an evaluation record.
        """
        data = json.loads(path.read_text())
        for section in ("contract", "settings"):  # both repeat sections of the parameters
            data[section] = current_names(data.get(section, {}), "")
        for name in PART_OF_THE_MODEL:
            data["contract"].pop(name, None)
        data["intervals"] = {name: (low, high) for name, (low, high) in data["intervals"].items()}
        return cls(**data, outcomes=_read_outcomes(path.with_name(OUTCOMES)))


def _read_outcomes(path: Path) -> dict[str, Outcomes]:
    outcomes: dict[str, Outcomes] = {}
    if path.is_file():
        for row in pq.read_table(path).to_pylist():
            outcomes.setdefault(row["score"], {})[row["key"]] = row["value"]
    return outcomes


def keyed(keys: Sequence[str], values: Sequence[float] | np.ndarray) -> Outcomes:
    """Outcomes of values and their keys.

    Raises:
        ValueError: if a key occurs twice, or the numbers of keys and values differ.
    """
    if len(set(keys)) != len(keys):
        raise ValueError("an outcome's key occurs twice")
    return {key: float(value) for key, value in zip(keys, values, strict=True)}


def record_of(key: str) -> str:
    """The id of the test record to which an outcome's key belongs."""
    return key.partition("#")[0]


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share among ``count`` (Wilson 1927). Unlike the bootstrap's, it is not empty at 0 and 1."""
    center = share + Z_95**2 / (2 * count)
    spread = Z_95 * math.sqrt(share * (1 - share) / count + Z_95**2 / (4 * count**2))
    low, high = ((center + sign * spread) / (1 + Z_95**2 / count) for sign in (-1, 1))
    return max(float(low), 0.0), min(float(high), 1.0)


def paired_differences(new: Mapping[str, float], old: Mapping[str, float], resamples: int, seed: int) -> np.ndarray:
    """Bootstrap distribution of the mean difference ``new - old`` of paired outcomes, float64 ``(resamples,)``.

    Args:
        new, old: outcomes with the same keys. Both models' outcomes of one record are drawn together, which leaves out the variance
            between records: they differ in difficulty much more than two models differ.
    """
    return resampled_means([new[key] - old[key] for key in new], resamples, seed, [record_of(key) for key in new])


def bootstrap(values: Sequence[float] | np.ndarray, resamples: int, seed: int, groups: Sequence[str] | None = None) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of values, one a prompt (Efron 1979).

    Args:
        resamples: number of bootstrap resamples.
        groups: the group of each value, such as the image of each question; groups are then resampled whole, as their values are not
            independent.
    """
    low, high = np.quantile(resampled_means(values, resamples, seed, groups), [0.025, 0.975])
    return float(low), float(high)


def resampled_means(values: Sequence[float] | np.ndarray, resamples: int, seed: int, groups: Sequence[str] | None = None) -> np.ndarray:
    """Means of bootstrap resamples, float64 ``(resamples,)``; arguments as in :func:`bootstrap`."""
    # The mean of a resample is the sum of its groups' sums over the sum of their counts.
    array = np.asarray(values, dtype=np.float64)
    numbers = np.unique(groups, return_inverse=True)[1] if groups is not None else np.arange(len(array))
    sums, counts = np.bincount(numbers, array), np.bincount(numbers)
    picks = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means: np.ndarray = sums[picks].sum(axis=1) / counts[picks].sum(axis=1)
    return means


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
