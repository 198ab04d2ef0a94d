"""How far two sets of training data are apart: one number a property, each with the limit of the section ``drift``.

A sample of few documents differs from another of the same kind by chance. What only one pair of samples in a thousand exceeds is added to
the limits of the properties that are distributions.

Shapes: n documents, d dimensions of the encoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cm3leon.config.schema import DriftConfig
from cm3leon.data.distances import RARE, chance_of_distance, distance, share_distance

SHRINKAGE = 0.1
"""Part of the covariance's mean variance that is added to its diagonal, so that it can be inverted with few records."""


class Duplicates(NamedTuple):
    """Records that repeat another one.

    Attributes:
        records: that were accepted.
        exact: share of the records read that were rejected, because they have the same pixels as another one.
        near: share of the accepted ones that are nearly the same as another one.
    """

    records: int
    exact: float
    near: float


class Data(NamedTuple):
    """What is compared of training data.

    Attributes:
        ids, licenses: of every document.
        lengths: of first captions, characters.
        sides: widths and heights (n, 2), pixels; None if they are not known.
        duplicates: among all records of the collection; None if they are not known.
        embeddings: of a sample of the documents, see :func:`features`.
    """

    ids: list[str]
    licenses: pd.Series
    lengths: np.ndarray
    sides: np.ndarray | None
    duplicates: Duplicates | None
    embeddings: np.ndarray


@dataclass(frozen=True)
class Shift:
    """One property of the champion's training data compared with that of the new data.

    Attributes:
        name: of the parameter ``drift.max_NAME``.
        value: how far the new data is off; None if it cannot be said.
        limit: the parameter's value.
        explanation: of the value, in words.
        chance: what is added to the limit, because samples of the same kind differ too.
    """

    name: str
    value: float | None
    limit: float
    explanation: str
    chance: float = 0.0

    @property
    def passed(self) -> bool:
        """False past the limit."""
        return self.value is None or self.value <= self.limit + self.chance

    def __str__(self) -> str:
        return f"{self.explanation}, drift.max_{self.name} is {self.limit:g}{f' + {self.chance:.2g} for chance' if self.chance else ''}"


def verdict_on(shifts: Sequence[Shift]) -> str:
    """The comparisons past their limits, in a sentence."""
    return "; ".join(str(shift) for shift in shifts if not shift.passed) or "the data is like that of the champion"


def shifts_between(config: DriftConfig, old: Data, new: Data, seed: int) -> list[Shift]:
    """All properties of two sets of training data compared.

    Args:
        seed: of the halves that :func:`separability` makes.
    """
    auc = separability(old.embeddings, new.embeddings, seed)
    by_chance = chance_of_auc(len(old.embeddings), len(new.embeddings))
    told = f"a classifier tells new documents from old ones with AUC {auc:.2f}"
    lengths, other = distance(old.lengths, new.lengths), share_distance(old.licenses, new.licenses)
    named = ", ".join(sorted(map(str, set(new.licenses) - set(old.licenses))))
    licenses = f"{other:.0%} of the documents have another license than before{f'; new: {named}' if named else ''}"
    lost = 1 - len(set(old.ids) & set(new.ids)) / len(old.ids)
    return [
        Shift("auc", auc, config.max_auc, told, by_chance),
        Shift("caption_shift", lengths, config.max_caption_shift, f"lengths of captions differ by {lengths:.2f}", _chance(old, new)),
        _size_shift(config, old, new),
        Shift("license_shift", other, config.max_license_shift, licenses),
        _duplicate_shift(config, old, new),
        Shift("lost", lost, config.max_lost, f"{lost:.0%} of the champion's training documents are gone"),
    ]


def _size_shift(config: DriftConfig, old: Data, new: Data) -> Shift:
    if old.sides is None or new.sides is None:
        return Shift("size_shift", None, config.max_size_shift, "sizes of the champion's images are not known")
    found = max(distance(old.sides[:, side], new.sides[:, side]) for side in (0, 1))
    return Shift("size_shift", found, config.max_size_shift, f"widths or heights of images differ by {found:.2f}", _chance(old, new))


def _duplicate_shift(config: DriftConfig, old: Data, new: Data) -> Shift:
    if old.duplicates is None or new.duplicates is None:
        return Shift("duplicate_shift", None, config.max_duplicate_shift, "duplicates of the champion's data are not known")
    before, now = old.duplicates, new.duplicates
    found = abs(now.exact - before.exact) + off_range(before, now)
    words = f"{now.exact:.0%} exact copies and {now.near:.0%} near-duplicates, {before.exact:.0%} and {before.near:.0%} before"
    return Shift("duplicate_shift", found, config.max_duplicate_shift, words)


def off_range(before: Duplicates, now: Duplicates) -> float:
    """By how much the share of near-duplicates is off what it should be in a collection of the same kind but another size.

    If a collection has the share because copies were added to it, another one has the same share. If records resemble each other by chance,
    with more of them it is more likely that a record resembles one: the share is then
    ``1 - (1 - share) ** (now.records / before.records)``. Everything between these two is as it should be.
    """
    by_chance: float = 1 - (1 - before.near) ** (now.records / max(before.records, 1))
    return max(0.0, min(before.near, by_chance) - now.near, now.near - max(before.near, by_chance))


def duplicates_of(report: Mapping[str, Any]) -> Duplicates:
    """The duplicates in a collection by the report of ``validate``, ``report.json``."""
    read, accepted = report["read"], report["accepted"]
    exact, near = report["reasons"].get("duplicate", 0), report["parts"]["rows_with_near_duplicates"]
    return Duplicates(accepted, exact / max(read, 1), near / max(accepted, 1))


def features(text_nd: np.ndarray, image_nd: np.ndarray) -> np.ndarray:
    """What the classifier sees of captions and images: both embeddings, and their products, which tell whether they fit together.

    Args:
        text_nd, image_nd: unit vectors.

    Returns:
        float32 (n, 3 d).
    """
    text_nd, image_nd = np.asarray(text_nd, dtype=np.float32), np.asarray(image_nd, dtype=np.float32)
    return np.concatenate([text_nd, image_nd, text_nd * image_nd], axis=1)


def separability(old_ND: np.ndarray, new_ND: np.ndarray, seed: int) -> float:
    """Area under the ROC curve of a linear discriminant between two samples: 0.5 if they are alike, 1 if they can be told apart.

    Each half is scored by the discriminant of the other half, so that nothing is learned by heart. Values below 0.5 are chance and count
    as 0.5.
    """
    from scipy.stats import mannwhitneyu

    rng = np.random.default_rng(seed)
    halves = [np.array_split(rng.permutation(len(sample)), 2) for sample in (old_ND, new_ND)]
    areas = []
    for fitted, scored in ((0, 1), (1, 0)):
        old_fit, new_fit = old_ND[halves[0][fitted]], new_ND[halves[1][fitted]]
        if min(len(old_fit), len(new_fit)) < 2:
            return 0.5
        within = np.concatenate([old_fit - old_fit.mean(0), new_fit - new_fit.mean(0)])
        covariance = within.T @ within / len(within)
        covariance += SHRINKAGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        direction = np.linalg.solve(covariance, new_fit.mean(0) - old_fit.mean(0))
        old_scores, new_scores = old_ND[halves[0][scored]] @ direction, new_ND[halves[1][scored]] @ direction
        areas.append(mannwhitneyu(new_scores, old_scores).statistic / (len(new_scores) * len(old_scores)))
    return max(0.5, float(np.mean(areas)))


def chance_of_auc(old: int, new: int) -> float:
    """By how much an AUC of samples of one kind and of these sizes exceeds 0.5 in :data:`RARE` cases (Mann and Whitney 1947)."""
    from scipy.stats import norm

    return float(norm.isf(RARE)) * math.sqrt((old + new + 1) / (12 * old * new))


def _chance(old: Data, new: Data) -> float:
    return chance_of_distance(len(old.lengths), len(new.lengths))
