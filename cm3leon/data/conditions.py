"""Condition images computed from any image: edges, soft edges, scribbles and straight lines, white on black.

``python -m cm3leon.data.conditions IMAGE OUT.png`` writes an image and all its condition images side by side.

Lengths scale with the image's side (of a rectangle, the geometric mean of both), so that an image gives similar lines at 32 pixels a side
and at 1024. Contrasts are differences of one color channel, as a share of its range.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from skimage import feature, transform
from skimage.morphology import skeletonize

WEAK, STRONG = 0.08, 0.2
"""Thresholds of Canny's hysteresis: an edge starts at a contrast of ``STRONG`` and is followed while it has at least ``WEAK``."""
SALIENT = 0.25
"""Contrast at which a soft edge has 1 - 1/e of the full brightness."""
SCRIBBLE_DETAIL = 128
"""Edges for scribbles are found in the image reduced to at most this many pixels a side: finer detail is left out."""
STROKE = 1 / 50
"""Half the width of a scribble's strokes, as a share of the side; at least one pixel."""
WOBBLE = 1 / 64
"""How far a scribble deviates from the edge along each axis, as a share of the side."""
LINE_DETAIL = 128
"""Straight lines are found in the image resized to this many pixels a side."""
SHORTEST_LINE, LINE_GAP, LINE_VOTES = 5, 2, 4
"""Least length of a line, its longest gap, and the least votes (edge pixels on it) in the Hough transform; pixels of the resized image."""

Extractor = Callable[[np.ndarray], np.ndarray]
"""uint8 (H, W, 3) -> uint8 (H, W, 3)."""


def _side(pixels: np.ndarray) -> float:
    """The image's side (geometric mean of height and width), pixels."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected a uint8 array (height, width, 3), got {pixels.dtype} {pixels.shape}")
    return math.sqrt(pixels.shape[0] * pixels.shape[1])


def _white_on_black(brightness: np.ndarray) -> np.ndarray:
    """Booleans or numbers from 0 to 1, (H, W), as gray uint8 (H, W, 3)."""
    return np.repeat((brightness * 255 + 0.5).astype(np.uint8)[..., None], 3, axis=2)


def _edges(pixels: np.ndarray, enlarged: float = 1.0) -> np.ndarray:
    """Edges of any color channel, one pixel wide: uint8 (H, W, 3) -> bool (H, W).

    Args:
        enlarged: factor by which the image was enlarged, which makes its edges less steep by as much.
    """
    sigma = max(1.0, _side(pixels) / 256)
    steepness = 8 / (max(sigma, enlarged) * math.sqrt(2 * math.pi))  # Sobel response to a smoothed step of contrast 1
    found = [
        feature.canny(pixels[..., channel] / 255, sigma, WEAK * steepness, STRONG * steepness, mode="nearest")
        for channel in range(3)
        if np.ptp(pixels[..., channel]) >= STRONG * 255
    ]
    return skeletonize(np.any(found, axis=0)) if found else np.zeros(pixels.shape[:2], bool)


def canny_edge(pixels: np.ndarray) -> np.ndarray:
    """Canny edges (Canny, IEEE PAMI 8(6), 1986) of all color channels, one pixel wide."""
    return _white_on_black(_edges(pixels))


def hed(pixels: np.ndarray) -> np.ndarray:
    """Soft edges like those of HED (arXiv 1504.06375): lines that fade to both sides, about as bright for every salient contrast.

    No network: the gradient of the smoothed image, divided by its maximum nearby.
    """
    side = _side(pixels)
    sigma = max(0.7, side / 128)
    smooth = ndimage.gaussian_filter(pixels.astype(np.float32) / 255, (sigma, sigma, 0), mode="nearest", truncate=3)
    slope = np.hypot(ndimage.sobel(smooth, 0, mode="nearest"), ndimage.sobel(smooth, 1, mode="nearest")).max(axis=2) / 8
    contrast = slope * sigma * math.sqrt(2 * math.pi)
    crest = np.maximum(ndimage.maximum_filter(contrast, 2 * round(side / 32) + 1, mode="nearest"), 1e-6)
    return _white_on_black(contrast / crest * (1 - np.exp(-((crest / SALIENT) ** 2))))


def _resized(pixels: np.ndarray, least: float, most: float) -> tuple[np.ndarray, float]:
    """The image, resized if its side is shorter than ``least`` or longer than ``most`` pixels, and the factor."""
    side = _side(pixels)
    factor = min(max(side, least), most) / side
    if factor == 1:
        return pixels, factor
    size = max(1, round(pixels.shape[1] * factor)), max(1, round(pixels.shape[0] * factor))
    method = Image.Resampling.BOX if factor < 1 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(pixels).resize(size, method)), factor


def scribbles(pixels: np.ndarray) -> np.ndarray:
    """Thick strokes roughly along the edges, which deviate by a smooth field that depends on the position only, not on the image."""
    # 1. Edges without short pieces: specks are not scribbled.
    height, width = pixels.shape[:2]
    small, factor = _resized(pixels, 0, SCRIBBLE_DETAIL)
    side = _side(small)
    lines = _edges(small)
    pieces, _ = ndimage.label(lines, np.ones((3, 3)))
    lines &= (np.bincount(pieces.ravel()) >= side / 16)[pieces]
    if not lines.any():
        return np.zeros((height, width, 3), np.uint8)

    # 2. For each pixel of the image the deviated position in the reduced one, and its distance to the nearest edge.
    y = (np.arange(height)[:, None] + 0.5) / height
    x = (np.arange(width)[None, :] + 0.5) / width
    deviation_x = WOBBLE * np.sin(2 * math.pi * (4.3 * y + 1.1 * x))
    deviation_y = WOBBLE * np.sin(2 * math.pi * (3.7 * x - 0.9 * y) + 1)
    coordinates = [(y + deviation_y) * small.shape[0] - 0.5, (x + deviation_x) * small.shape[1] - 0.5]
    distance = ndimage.map_coordinates(ndimage.distance_transform_edt(~lines), coordinates, order=1, mode="nearest")

    # 3. White up to the width of a stroke, with an antialiased border.
    return _white_on_black(np.clip((max(1.0, STROKE * side) - distance) / factor + 0.5, 0, 1))


def straight_lines(pixels: np.ndarray) -> np.ndarray:
    """Straight line segments like those of M-LSD (arXiv 2106.00186), by a probabilistic Hough transform with a fixed seed."""
    resized, factor = _resized(pixels, LINE_DETAIL, LINE_DETAIL)
    lines = transform.probabilistic_hough_line(_edges(resized, factor), LINE_VOTES, SHORTEST_LINE, LINE_GAP, rng=0)
    image = Image.new("L", (pixels.shape[1], pixels.shape[0]))
    draw = ImageDraw.Draw(image)
    for start, end in lines:
        draw.line([(value + 0.5) / factor - 0.5 for value in (*start, *end)], fill=255, width=max(1, round(_side(pixels) / 256)))
    return np.repeat(np.asarray(image)[..., None], 3, axis=2)


EXTRACTORS: dict[str, Extractor] = {
    "canny edge": canny_edge, "hed": hed, "children's scribbles": scribbles, "M-LSD lines": straight_lines,
}  # fmt: skip
"""Extractor of each kind of condition (``cm3leon.sequence.tasks.CONDITIONS``); ValueError for an array that is not uint8 (H, W, 3)."""


if __name__ == "__main__":
    original = np.asarray(Image.open(sys.argv[1]).convert("RGB"))
    Image.fromarray(np.hstack([original, *(extract(original) for extract in EXTRACTORS.values())])).save(sys.argv[2])
