"""The drift check: is the new training data still of the kind that the champion was trained on? To be asked after ``validate``.

Both sides are seen through the champion's own encoder. A large shift is not an error by itself, but training on it costs hours, and the
champion's scores say little of it: past the limits of the section ``drift`` the check is an error, and a person decides. A run of the
pipeline does not ask by itself.
"""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import ks_2samp, mannwhitneyu

from cm3leon.config import paths
from cm3leon.config.schema import DriftConfig
from cm3leon.data.manifest import ImageStore, read_manifest
from cm3leon.models.clip import Encoder
from cm3leon.registry.bundle import TRAINING_DATA
from cm3leon.registry.registry import CHAMPION, MODEL_NAME, NotRegisteredError, fetch_bundle
from cm3leon.retrieval.index import MemoryBank, multimodal_records
from cm3leon.utils.device import default_device
from cm3leon.utils.errors import UserError
from cm3leon.utils.html import image_tag, page

SHRINKAGE = 0.1
"""Part of the covariance's mean variance that is added to its diagonal, so that it can be inverted with few records."""


class DriftError(UserError):
    """The data has drifted past a threshold."""


@dataclass(frozen=True)
class Shift:
    """One comparison of the champion's training data with the new data.

    Attributes:
        name: of the parameter ``drift.max_NAME``.
        value: how far the new data is off, 0 for the same distribution; None if it cannot be said.
        limit: the largest value that passes.
        explanation: of the value, in words.
    """

    name: str
    value: float | None
    limit: float
    explanation: str

    @property
    def passed(self) -> bool:
        """False past the limit."""
        return self.value is None or self.value <= self.limit


@dataclass(frozen=True)
class Drift:
    """All comparisons, and their page."""

    shifts: list[Shift]
    page: str

    def __str__(self) -> str:
        failed = [f"{shift.explanation} (drift.max_{shift.name} is {shift.limit:g})" for shift in self.shifts if not shift.passed]
        return "; ".join(failed) if failed else "the data is like that of the champion"

    @property
    def passed(self) -> bool:
        """False if a comparison is past its limit."""
        return all(shift.passed for shift in self.shifts)


class Data(NamedTuple):
    """What is compared of training data.

    Attributes:
        ids, licenses: of every document.
        lengths: of first captions, characters.
        sizes: geometric means of width and height, pixels; None if they are not known.
        embeddings: of a sample of the documents, caption and image side by side (n, 2 d).
    """

    ids: list[str]
    licenses: pd.Series
    lengths: np.ndarray
    sizes: np.ndarray | None
    embeddings: np.ndarray


def measure_drift(config: DriftConfig, seed: int) -> Drift | None:
    """Compare the training split in ``data/validated`` with what the champion was trained on; None if there is no champion.

    Args:
        seed: of the sampled records.
    """
    try:
        bundle = fetch_bundle(f"models:/{MODEL_NAME}@{CHAMPION}")
    except NotRegisteredError:
        return None
    rng = np.random.default_rng(seed)

    # 1. The champion's data. Its memory bank holds the embeddings.
    bank = MemoryBank.load(bundle / "memory_bank")
    listed = bundle / TRAINING_DATA
    documents = pd.read_parquet(listed) if listed.is_file() else bank.documents
    positions = rng.permutation(len(bank))[: config.sample]
    embeddings = np.concatenate([bank.text[positions], bank.image[positions]], axis=1).astype(np.float32)
    old = Data(documents["id"].tolist(), documents["licence"], _lengths(bank.documents), _sizes(documents), embeddings)

    # 2. The new data, of which a sample is embedded by the champion's encoder.
    records = multimodal_records(read_manifest(paths.VALIDATED, "train"))
    sampled = records.iloc[np.sort(rng.permutation(len(records))[: config.sample])]
    encoder, store = Encoder.load(bundle / "encoder").to(default_device()), ImageStore(paths.RAW)
    images = encoder.encode_images([store.open(ref) for ref in sampled["image"]])
    embeddings = np.concatenate([encoder.encode_texts(sampled["caption"].tolist()), images], axis=1)
    new = Data(records["id"].tolist(), records["licence"], _lengths(records), _sizes(records), embeddings)
    return compare_data(config, old, new, seed)


def compare_data(config: DriftConfig, old: Data, new: Data, seed: int) -> Drift:
    """The comparisons of two sets of training data, and their page.

    Args:
        seed: of the halves that :func:`separability` makes.
    """
    auc = separability(old.embeddings, new.embeddings, seed)
    lengths = _distance(old.lengths, new.lengths)
    shares = [data.licenses.value_counts(normalize=True) for data in (old, new)]
    licenses = float(shares[0].sub(shares[1], fill_value=0).abs().sum() / 2)
    named = ", ".join(sorted(map(str, set(new.licenses) - set(old.licenses))))
    lost = 1 - len(set(old.ids) & set(new.ids)) / len(old.ids)
    shifts = [
        Shift("auc", auc, config.max_auc, f"a classifier tells new documents from old ones with AUC {auc:.2f} (0.5: not at all)"),
        Shift("caption_shift", lengths, config.max_caption_shift, f"lengths of captions differ by {lengths:.2f} (KS)"),
        _size_shift(config, old.sizes, new.sizes),
        Shift(
            "license_shift",
            licenses,
            config.max_license_shift,
            f"{licenses:.0%} of the documents have another license than before{f'; new: {named}' if named else ''}",
        ),
        Shift("lost", lost, config.max_lost, f"{lost:.0%} of the champion's training documents are gone"),
    ]
    figures = {
        "embeddings": _figure(
            lambda axes: _scatter(axes, old.embeddings, new.embeddings), "first two principal components of the embeddings"
        ),
        "captions": _figure(lambda axes: _histograms(axes, [old.lengths, new.lengths]), "characters of the first caption"),
        "licenses": _figure(lambda axes: _bars(axes, shares), "share of the documents by license"),
    }
    if old.sizes is not None and new.sizes is not None:
        sizes = [old.sizes, new.sizes]
        figures["sizes"] = _figure(lambda axes: _histograms(axes, sizes), "geometric mean of width and height, pixels")
    return Drift(shifts, _page(shifts, figures, len(old.ids), len(new.ids)))


def _size_shift(config: DriftConfig, old: np.ndarray | None, new: np.ndarray | None) -> Shift:
    if old is None or new is None:
        return Shift("size_shift", None, config.max_size_shift, "sizes of the champion's images are not known")
    distance = _distance(old, new)
    return Shift("size_shift", distance, config.max_size_shift, f"sizes of images differ by {distance:.2f} (KS)")


def _distance(old: np.ndarray, new: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance: the largest difference of two cumulative distributions, 0 to 1."""
    return float(ks_2samp(old, new).statistic)


def _lengths(records: pd.DataFrame) -> np.ndarray:
    return records["caption"].str.len().to_numpy(dtype=float)


def _sizes(records: pd.DataFrame) -> np.ndarray | None:
    if "width" not in records:
        return None
    sizes: np.ndarray = np.sqrt(records["width"].to_numpy(dtype=float) * records["height"].to_numpy(dtype=float))
    return sizes


def separability(old_ND: np.ndarray, new_ND: np.ndarray, seed: int) -> float:
    """Area under the ROC curve of a linear discriminant between two samples: 0.5 if they are alike, 1 if they can be told apart.

    Each half is scored by the discriminant of the other half, so that nothing is learned by heart. Values below 0.5 are chance and count
    as 0.5.
    """
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


# --- the page ---------------------------------------------------------------------------------------------------------

NAMES, COLORS = ("champion's data", "new data"), ("#3b6fd4", "#e07b39")


def _page(shifts: Sequence[Shift], figures: dict[str, bytes], old: int, new: int) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(shift.explanation)}</td><td>{'' if shift.value is None else f'{shift.value:.3f}'}</td>"
        f"<td>{shift.limit:g}</td><td>{'passes' if shift.passed else '<b>past the limit</b>'}</td></tr>"
        for shift in shifts
    )
    plots = "".join(f"<h2>{name}</h2>{image_tag(png, name)}" for name, png in figures.items())
    body = (
        f"<h1>Drift: {old:,} documents of the champion, {new:,} new ones</h1>"
        f"<table><tr><th>comparison</th><th>value</th><th>limit</th><th></th></tr>{rows}</table>{plots}"
    )
    return page("drift", body)


def _figure(plot: Any, label: str) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3), dpi=100)
    plot(axes)
    axes.set_xlabel(label)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    plt.close(figure)
    return file.getvalue()


def _histograms(axes: Any, samples: Sequence[np.ndarray]) -> None:
    bins = np.histogram_bin_edges(np.concatenate(samples), 40)
    for sample, name, color in zip(samples, NAMES, COLORS, strict=True):
        axes.hist(sample, bins, weights=np.full(len(sample), 1 / len(sample)), alpha=0.5, label=name, color=color)
    axes.set_ylabel("share")


def _bars(axes: Any, shares: Sequence[pd.Series]) -> None:
    names = sorted(set(shares[0].index) | set(shares[1].index))
    for offset, (share, name, color) in enumerate(zip(shares, NAMES, COLORS, strict=True)):
        axes.bar(np.arange(len(names)) + 0.4 * offset, [float(share.get(key, 0)) for key in names], 0.4, label=name, color=color)
    axes.set_xticks(np.arange(len(names)) + 0.2, names, rotation=20)
    axes.set_ylabel("share")


def _scatter(axes: Any, old_ND: np.ndarray, new_ND: np.ndarray) -> None:
    center = np.concatenate([old_ND, new_ND]).mean(0)
    _, _, components = np.linalg.svd(np.concatenate([old_ND, new_ND]) - center, full_matrices=False)
    for sample, name, color in zip((old_ND, new_ND), NAMES, COLORS, strict=True):
        projected = (sample - center) @ components[:2].T
        axes.scatter(projected[:, 0], projected[:, 1], s=4, alpha=0.4, label=name, color=color)


def check_drift(config: DriftConfig, seed: int, report: Path) -> str:
    """Measure the drift and write its page; returns a sentence.

    Raises:
        DriftError: past a threshold.
    """
    drift = measure_drift(config, seed)
    if drift is None:
        return "there is no champion yet whose data could be compared"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(drift.page, encoding="utf-8")
    if not drift.passed:
        raise DriftError(f"the data has drifted: {drift}; see {report}. If that is intended, raise the limit in params.yaml")
    return str(drift)
