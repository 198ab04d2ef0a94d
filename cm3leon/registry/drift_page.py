"""The page of a drift check: the comparisons as a table, and a plot of each property."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cm3leon.registry.shifts import Data, Shift, verdict_on
from cm3leon.utils.html import image_tag, page

NAMES, COLORS = ("champion's data", "new data"), ("#3b6fd4", "#e07b39")


def drift_page(shifts: Sequence[Shift], old: Data, new: Data) -> str:
    """The page as HTML of one file."""
    rows = "".join(
        f"<tr><td>{html.escape(shift.explanation)}</td><td>{'' if shift.value is None else f'{shift.value:.3f}'}</td>"
        f"<td>{shift.limit:g}{f' + {shift.chance:.3f}' if shift.chance else ''}</td>"
        f"<td>{'passes' if shift.passed else '<b>past the limit</b>'}</td></tr>"
        for shift in shifts
    )
    plots = "".join(f"<h2>{name}</h2>{image_tag(png, name)}" for name, png in _figures(old, new).items())
    body = (
        f"<h1>Drift: {len(old.ids):,} documents of the champion, {len(new.ids):,} new ones</h1>"
        f"<p><b>{html.escape(verdict_on(shifts))}</b></p>"
        f"<table><tr><th>comparison</th><th>value</th><th>limit + chance</th><th></th></tr>{rows}</table>{plots}"
    )
    return page("drift", body)


def _figures(old: Data, new: Data) -> dict[str, bytes]:
    shares = [data.licenses.value_counts(normalize=True) for data in (old, new)]
    figures = {
        "embeddings": _figure(
            lambda axes: _scatter(axes, old.embeddings, new.embeddings), "first two principal components of the embeddings"
        ),
        "captions": _figure(lambda axes: _histograms(axes, [old.lengths, new.lengths]), "characters of the first caption"),
        "licenses": _figure(lambda axes: _bars(axes, shares), "share of the documents by license"),
    }
    if old.sides is not None and new.sides is not None:
        widths, heights = ([data.sides[:, side] for data in (old, new) if data.sides is not None] for side in (0, 1))
        figures["widths"] = _figure(lambda axes: _histograms(axes, widths), "width of the image, pixels")
        figures["heights"] = _figure(lambda axes: _histograms(axes, heights), "height of the image, pixels")
    return figures


def _figure(plot: Callable[[Any], None], label: str) -> bytes:
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
