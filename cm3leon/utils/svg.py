"""Small drawings for HTML pages, as SVG elements that load nothing."""

from __future__ import annotations

import html

import numpy as np

WIDTH, HEIGHT, FOOT = 300, 110, 18
"""Of a histogram, pixels; ``FOOT`` is that of the line with its labels."""
BINS = 24
NOW, BEFORE = "#3b6fd4", "#c2571a"


def histogram(values: np.ndarray, title: str, before: np.ndarray | None = None) -> str:
    """How often values occur, as bars whose labels a pointer shows; ``before`` are those of an earlier time, as an outline.

    Args:
        values: (n,), not empty.
        before: (m,), not empty.
    """
    everything = values if before is None else np.concatenate([values, before])
    edges = np.histogram_bin_edges(everything, BINS) if everything.min() < everything.max() else everything[0] + np.array([-0.5, 0.5])
    shares = [np.histogram(sample, edges)[0] / len(sample) for sample in (values, before) if sample is not None]
    most, wide = max(float(share.max()) for share in shares), WIDTH / (len(edges) - 1)
    heights = [share / most * HEIGHT for share in shares]
    counts = np.histogram(values, edges)[0]
    bars = "".join(
        f'<rect x="{number * wide:.1f}" y="{HEIGHT - height:.1f}" width="{wide - 1:.1f}" height="{height:.1f}" fill="{NOW}">'
        f"<title>{edges[number]:,.0f} to {edges[number + 1]:,.0f}: {counts[number]:,}</title></rect>"
        for number, height in enumerate(heights[0])
        if height
    )
    outline = ""
    if before is not None:
        steps = " ".join(f"{(number + end) * wide:.1f},{HEIGHT - height:.1f}" for number, height in enumerate(heights[1]) for end in (0, 1))
        outline = f'<polyline points="{steps}" fill="none" stroke="{BEFORE}" stroke-width="1.5"/>'
    low, high = float(everything.min()), float(everything.max())
    labels = f'<text x="0" y="{HEIGHT + 14}">{low:,.0f}</text><text x="{WIDTH}" y="{HEIGHT + 14}" text-anchor="end">{high:,.0f}</text>'
    return (
        f'<svg role="img" aria-label="{html.escape(title)}" width="{WIDTH}" height="{HEIGHT + FOOT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT + FOOT}" font-size="11" fill="#5a6573">'
        f'{bars}{outline}<line x1="0" y1="{HEIGHT}" x2="{WIDTH}" y2="{HEIGHT}" stroke="#9aa5b1"/>{labels}</svg>'
    )
