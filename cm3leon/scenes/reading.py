"""Read a scene of shapes back from an image by classical image analysis: nothing is learned, every step can be explained.

Background = the border's dominant color; objects = connected regions that differ from it; an object's color = the nearest named color of
its core; its soft mask = how far each pixel lies from the background towards that color; shape, size and letter = the rendered template
that overlaps this mask best. Works from 48 pixels a side up, on blurred, noisy or vector-quantized images.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

from cm3leon.scenes.scene import BACKGROUNDS, COLORS, EXTENTS, LETTERS, SHAPES, SIZES, Object, Scene, letter_distance, letter_extent

LARGEST_SIDE = 128
"""Larger images are reduced to this side first."""
FOREGROUND = 22.0
"""Least CIELAB distance of an object's pixel to the background."""
SMALLEST_AREA = 0.006
"""Smaller regions are taken for artifacts, share of the image's area; the smallest object of the vocabulary has 0.021."""
LEAST_OVERLAP = 0.6
"""A region that overlaps no template this well has the shape ``"unknown"``."""
SECOND_COLOR = 0.3
"""A region is divided by color where a second named color covers at least this share of its core."""
BLUR = 1 / 64
"""Templates are tried sharp and under a Gaussian blur of this standard deviation, share of the side."""
LETTER_HEIGHT = 0.44
"""Only regions of at least this height are compared with letters, share of the side."""
UNKNOWN = "unknown"

NAMES = [*COLORS, *BACKGROUNDS]
SIZE_LIMIT = math.sqrt(SIZES["small"] * SIZES["large"])


@cache
def _lab_table() -> np.ndarray:
    value = np.arange(256) / 255
    return np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92).astype(np.float32)


_TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32
) / np.array([[0.9505], [1.0], [1.089]], np.float32)  # fmt: skip


def to_lab(pixels: np.ndarray) -> np.ndarray:
    """uint8 sRGB (..., 3) to CIELAB (..., 3), white point D65."""
    xyz = _lab_table()[pixels] @ _TO_XYZ.T
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


@cache
def _named_lab() -> np.ndarray:
    return to_lab(np.array([*COLORS.values(), *BACKGROUNDS.values()], np.uint8))


def _nearest_names(lab: np.ndarray) -> np.ndarray:
    """Index into NAMES of the nearest named color: lab (n, 3) -> (n,)."""
    named = _named_lab()
    return np.argmin((named**2).sum(1) - 2 * lab @ named.T, axis=1)


@cache
def _shape_moments(shape: str) -> tuple[float, float, float]:
    """Area and centroid (x, y) of a shape, in units of its radius."""
    grid = (np.arange(400) + 0.5) / 400 * 3 - 1.5
    x, y = np.meshgrid(grid, grid)
    inside = SHAPES[shape](x, y) < 0
    return inside.mean() * 9, x[inside].mean(), y[inside].mean()


def read_scene(image: Image.Image | np.ndarray) -> Scene:
    """The scene an image shows. ``image``: a PIL image or uint8 (h, w, 3).

    The scene's background may be any named color (also an object's), an object's shape may be ``"unknown"``.

    Raises:
        ValueError: if an array is not uint8 (h, w, 3).
    """
    pixels = _as_pixels(image)
    lab = to_lab(pixels)
    border = np.concatenate([lab[:2].reshape(-1, 3), lab[-2:].reshape(-1, 3), lab[:, :2].reshape(-1, 3), lab[:, -2:].reshape(-1, 3)])
    names = _nearest_names(border)
    background = int(np.bincount(names).argmax())
    ground_lab = np.median(border[names == background], axis=0)
    contrast = np.sqrt(((lab - ground_lab) ** 2).sum(-1))
    foreground = contrast > FOREGROUND
    ground = np.median(pixels[~foreground], axis=0) if not foreground.all() else np.array([0.0, 0.0, 0.0])
    labels, _ = ndimage.label(foreground)
    objects = []
    least = SMALLEST_AREA * foreground.size
    for index, window in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[window] == index
        if mask.sum() >= least:
            objects += _read_region(pixels, lab, contrast, ground, mask, window, least)
    return Scene(NAMES[background], tuple(objects))


def _as_pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected a uint8 array (height, width, 3), got {image.dtype} {image.shape}")
        if max(image.shape[:2]) <= LARGEST_SIDE:
            return image
        image = Image.fromarray(image)
    if max(image.size) > LARGEST_SIDE:
        factor = LARGEST_SIDE / max(image.size)
        image = image.convert("RGB").resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BOX)
    return np.asarray(image.convert("RGB"))


def _read_region(
    pixels: np.ndarray, lab: np.ndarray, contrast: np.ndarray, ground: np.ndarray, mask: np.ndarray, window: tuple[slice, ...], least: float
) -> list[Object]:
    """The objects of one connected region: one, or several where parts of different colors touch."""
    strength = contrast[window]
    core = mask & (strength >= 0.7 * np.percentile(strength[mask], 90))
    names = np.full(mask.shape, -1)
    names[core] = _nearest_names(lab[window][core])
    votes = np.bincount(names[core], minlength=len(NAMES))
    share = votes / votes.sum()
    found = [int(name) for name in np.argsort(-share) if share[name] >= SECOND_COLOR and votes[name] >= least]
    if len(found) < 2:
        name = int(votes.argmax())
        return [_read_object(pixels, ground, mask, names == name, window, NAMES[name])]
    parts = []
    for name in found:
        pieces, count = ndimage.label(names == name)
        for piece in range(1, count + 1):
            part = pieces == piece
            if part.sum() >= least:
                parts.append(_read_object(pixels, ground, part, part, window, NAMES[name]))
    return parts


def _read_object(
    pixels: np.ndarray, ground: np.ndarray, mask: np.ndarray, core: np.ndarray, window: tuple[slice, ...], color: str
) -> Object:
    """Fit the templates to one region. ``mask`` and ``core`` are cut to ``window``; the fit looks two pixels around it."""
    height, width = pixels.shape[:2]
    side = math.sqrt(height * width)
    color_difference = np.median(pixels[window][core], axis=0) - ground
    top, left = max(window[0].start - 2, 0), max(window[1].start - 2, 0)
    bottom, right = min(window[0].stop + 2, height), min(window[1].stop + 2, width)
    wide = np.zeros((bottom - top, right - left), bool)
    wide[window[0].start - top : window[0].stop - top, window[1].start - left : window[1].stop - left] = mask
    wide = ndimage.binary_dilation(wide, np.ones((3, 3), bool))
    along = (pixels[top:bottom, left:right] - ground) @ color_difference / max(color_difference @ color_difference, 1e-6)
    alpha = np.where(wide, np.clip(along, 0, 1), 0)
    x, y = np.arange(left, right) + 0.5, np.arange(top, bottom) + 0.5
    shape, overlap, radius, cx, cy = _fit_shapes(alpha, x, y, side)
    if window[0].stop - window[0].start >= LETTER_HEIGHT * height:
        letter, letter_overlap, mx, my = _fit_letters(alpha, x, y)
        if letter_overlap > overlap and letter_overlap >= LEAST_OVERLAP:
            return Object("letter", color, "large", mx / width, my / height, letter)
    size = "small" if radius < SIZE_LIMIT * side else "large"
    return Object(shape if overlap >= LEAST_OVERLAP else UNKNOWN, color, size, cx / width, cy / height)


def _overlap(alpha: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Intersection over union of soft masks: alpha (h, w), templates (n, h, w) -> (n,)."""
    common = np.minimum(alpha, templates).sum((1, 2))
    return common / np.maximum(alpha.sum() + templates.sum((1, 2)) - common, 1e-6)


def _box(alpha: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, float, float, float]:
    """Outline of the soft mask, pixels, refined below a pixel by the outermost lines' peak values."""
    columns, rows = alpha.max(0), alpha.max(1)
    xs, ys = np.flatnonzero(columns > 0.5), np.flatnonzero(rows > 0.5)
    if not len(xs) or not len(ys):
        return x[0], y[0], x[-1], y[-1]
    return x[xs[0]] - 0.5, y[ys[0]] - 0.5, x[xs[-1]] + 0.5, y[ys[-1]] + 0.5


def _fit_shapes(alpha: np.ndarray, x: np.ndarray, y: np.ndarray, side: float) -> tuple[str, float, float, float, float]:
    """(shape, overlap, radius, center x, center y) of the best shape, fitted by area and centroid and again by the bounding box; pixels."""
    area = max(alpha.sum(), 1e-6)
    mx, my = float((alpha.sum(0) * x).sum() / area), float((alpha.sum(1) * y).sum() / area)
    x0, y0, x1, y1 = _box(alpha, x, y)
    fits, templates = [], []
    for shape, distance in SHAPES.items():
        unit_area, ux, uy = _shape_moments(shape)
        by_area = math.sqrt(area / unit_area)
        e = EXTENTS[shape]
        by_box = math.sqrt(max((x1 - x0) * (y1 - y0), 1) / ((e[2] - e[0]) * (e[3] - e[1])))
        box_x, box_y = (x0 + x1 - by_box * (e[0] + e[2])) / 2, (y0 + y1 - by_box * (e[1] + e[3])) / 2
        for radius, cx, cy in ((by_area, mx - by_area * ux, my - by_area * uy), (by_box, box_x, box_y)):
            fits.append((shape, radius, cx, cy))
            templates.append(distance((x[None] - cx) / radius, (y[:, None] - cy) / radius) * -radius)
    sharp = np.clip(np.stack(templates) + 0.5, 0, 1)
    blurred = ndimage.gaussian_filter(sharp, (0, BLUR * side, BLUR * side), mode="constant", truncate=3)
    overlaps = np.maximum(_overlap(alpha, sharp), _overlap(alpha, blurred))
    best = int(overlaps.argmax())
    shape, radius, cx, cy = fits[best]
    return shape, float(overlaps[best]), radius, cx, cy


def _fit_letters(alpha: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[str, float, float, float]:
    """(letter, overlap, center x, center y) of the best letter, fitted to the bounding box; pixels."""
    x0, y0, x1, y1 = _box(alpha, x, y)
    centers, templates = [], []
    for letter in LETTERS:
        e = letter_extent(letter)
        half = (y1 - y0) / (e[3] - e[1])
        cx, cy = (x0 + x1 - half * (e[0] + e[2])) / 2, (y0 + y1 - half * (e[1] + e[3])) / 2
        centers.append((cx, cy))
        templates.append(letter_distance(letter, (x[None] - cx) / half, (y[:, None] - cy) / half) * -half)
    overlaps = _overlap(alpha, np.clip(np.stack(templates) + 0.5, 0, 1))
    best = int(overlaps.argmax())
    return list(LETTERS)[best], float(overlaps[best]), *centers[best]
