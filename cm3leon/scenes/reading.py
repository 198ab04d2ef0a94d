"""Read a scene back from an image by classical image analysis: nothing is learned, and every step can be checked.

The background is the border's dominant color; objects are connected regions that differ from it; an object's color is the nearest named
color of the region's core; its soft mask tells how far each pixel lies between background and that color; its shape, size and letter are
those of the template that has the highest intersection over union with the mask. It works on images of 48 pixels a side and more, also
if they are blurred, noisy or vector-quantized.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

from cm3leon.scenes.scene import BACKGROUNDS, COLORS, EXTENTS, LETTERS, SHAPES, SIZES, Object, Scene, letter_distance, letter_extent

LARGEST_SIDE = 128
"""Larger images are downsampled to this side first, pixels."""
FOREGROUND = 22.0
"""Least CIELAB distance between a pixel of an object and the background."""
SMALLEST_AREA = 0.006
"""Smaller regions are ignored as artifacts, fraction of the image's area; the smallest object of the vocabulary has 0.021."""
LEAST_OVERLAP = 0.6
"""Least intersection over union with a template; a region that has less with all of them has the shape ``"unknown"``."""
SECOND_COLOR = 0.3
"""A region is divided by color if a second named color covers at least this fraction of its core."""
BLUR = 1 / 64
"""Templates are compared sharp and after a Gaussian blur of this standard deviation, fraction of the side."""
LETTER_HEIGHT = 0.44
"""Only regions of at least this height are compared with letters, fraction of the side."""
UNKNOWN = "unknown"

NAMES = [*COLORS, *BACKGROUNDS]
SIZE_LIMIT = math.sqrt(SIZES["small"] * SIZES["large"])
"""Radius between small and large: the geometric mean of the two."""


@cache
def _linear_table() -> np.ndarray:
    """Linear light of the 256 sRGB values (IEC 61966-2-1): float32 (256,)."""
    value = np.arange(256) / 255
    return np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92).astype(np.float32)


# Linear sRGB to XYZ, relative to the white point D65.
_TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32
) / np.array([[0.9505], [1.0], [1.089]], np.float32)  # fmt: skip


def to_lab(pixels: np.ndarray) -> np.ndarray:
    """uint8 sRGB (..., 3) to CIELAB (..., 3), CIE 1976, white point D65."""
    xyz = _linear_table()[pixels] @ _TO_XYZ.T
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


@cache
def _named_lab() -> np.ndarray:
    return to_lab(np.array([*COLORS.values(), *BACKGROUNDS.values()], np.uint8))


def _nearest_names(lab: np.ndarray) -> np.ndarray:
    """Index into NAMES of the nearest named color: CIELAB (n, 3) -> (n,)."""
    # |a - b|^2 = |a|^2 - 2 a.b + |b|^2, of which |a|^2 is the same for every name.
    named = _named_lab()
    return np.argmin((named**2).sum(1) - 2 * lab @ named.T, axis=1)


@cache
def _shape_moments(shape: str) -> tuple[float, float, float]:
    """Area and centroid (x, y) of a shape, in units of its radius, by counting grid points."""
    grid = (np.arange(400) + 0.5) / 400 * 3 - 1.5
    x, y = np.meshgrid(grid, grid)
    inside = SHAPES[shape](x, y) < 0
    return inside.mean() * 9, x[inside].mean(), y[inside].mean()


def read_scene(image: Image.Image | np.ndarray) -> Scene:
    """Read the scene that an image shows.

    Any named color can be read as the background, also those of objects. An object's shape can be :data:`UNKNOWN`.

    Args:
        image: a PIL image, or RGB as uint8 (h, w, 3).

    Raises:
        ValueError: if an array is not uint8 (h, w, 3).
    """
    # 1. The background: the most frequent named color on the border, two pixels wide, where objects seldom reach.
    pixels = _as_pixels(image)
    lab = to_lab(pixels)
    border = np.concatenate([lab[:2].reshape(-1, 3), lab[-2:].reshape(-1, 3), lab[:, :2].reshape(-1, 3), lab[:, -2:].reshape(-1, 3)])
    names = _nearest_names(border)
    background = int(np.bincount(names).argmax())
    ground_lab = np.median(border[names == background], axis=0)

    # 2. The foreground: pixels whose color differs visibly from the background.
    contrast = np.sqrt(((lab - ground_lab) ** 2).sum(-1))
    foreground = contrast > FOREGROUND
    ground = np.median(pixels[~foreground], axis=0) if not foreground.all() else np.array([0.0, 0.0, 0.0])

    # 3. Objects: connected regions of the foreground that are large enough.
    labels, _ = ndimage.label(foreground)
    objects = []
    least = SMALLEST_AREA * foreground.size
    for index, window in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[window] == index
        if mask.sum() >= least:
            objects += _read_region(pixels, lab, contrast, ground, mask, window, least)
    return Scene(NAMES[background], tuple(objects))


def _as_pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """RGB, uint8 (h, w, 3), at most :data:`LARGEST_SIDE` a side."""
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
    """Read the objects of a connected region: one, or several if objects of different colors touch.

    Args:
        pixels: the whole image, uint8 (h, w, 3); ``lab`` (h, w, 3) and ``contrast`` (h, w), its distance to the background, likewise.
        ground: RGB of the background.
        mask: the region's pixels within ``window``.
        least: pixels of the smallest object.
    """
    # Colors are read in the core alone: pixels on an edge mix object and background.
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
    objects = []
    for name in found:
        labels, count = ndimage.label(names == name)
        for label in range(1, count + 1):
            own = labels == label
            if own.sum() >= least:
                objects.append(_read_object(pixels, ground, own, own, window, NAMES[name]))
    return objects


def _read_object(
    pixels: np.ndarray, ground: np.ndarray, mask: np.ndarray, core: np.ndarray, window: tuple[slice, ...], color: str
) -> Object:
    """Fit the templates to one region; ``mask`` and ``core`` are its pixels within ``window``."""
    # 1. A window two pixels wider, and a mask one pixel wider: an antialiased or blurred edge extends beyond the region.
    height, width = pixels.shape[:2]
    side = math.sqrt(height * width)
    color_difference = np.median(pixels[window][core], axis=0) - ground
    top, left = max(window[0].start - 2, 0), max(window[1].start - 2, 0)
    bottom, right = min(window[0].stop + 2, height), min(window[1].stop + 2, width)
    wide = np.zeros((bottom - top, right - left), bool)
    wide[window[0].start - top : window[0].stop - top, window[1].start - left : window[1].stop - left] = mask
    wide = ndimage.binary_dilation(wide, np.ones((3, 3), bool))

    # 2. The soft mask: each pixel's color projected on the line from background (0) to object (1).
    along = (pixels[top:bottom, left:right] - ground) @ color_difference / max(color_difference @ color_difference, 1e-6)
    alpha = np.where(wide, np.clip(along, 0, 1), 0)

    # 3. The best template of all shapes, and of letters if the region is as high as one.
    x, y = np.arange(left, right) + 0.5, np.arange(top, bottom) + 0.5
    shape, overlap, radius, cx, cy = _fit_shapes(alpha, x, y, side)
    if window[0].stop - window[0].start >= LETTER_HEIGHT * height:
        letter, letter_overlap, mx, my = _fit_letters(alpha, x, y)
        if letter_overlap > overlap and letter_overlap >= LEAST_OVERLAP:
            return Object("letter", color, "large", mx / width, my / height, letter)
    size = "small" if radius < SIZE_LIMIT * side else "large"
    return Object(shape if overlap >= LEAST_OVERLAP else UNKNOWN, color, size, cx / width, cy / height)


def _overlap(alpha: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Intersection over union of soft masks, as sum of minima over sum of maxima: alpha (h, w), templates (n, h, w) -> (n,)."""
    # max(a, b) = a + b - min(a, b)
    common = np.minimum(alpha, templates).sum((1, 2))
    return common / np.maximum(alpha.sum() + templates.sum((1, 2)) - common, 1e-6)


def _box(alpha: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, float, float, float]:
    """Bounding box x0, y0, x1, y1 of the soft mask where it exceeds one half, pixels; the whole window if it does nowhere."""
    columns, rows = alpha.max(0), alpha.max(1)
    xs, ys = np.flatnonzero(columns > 0.5), np.flatnonzero(rows > 0.5)
    if not len(xs) or not len(ys):
        return x[0], y[0], x[-1], y[-1]
    return x[xs[0]] - 0.5, y[ys[0]] - 0.5, x[xs[-1]] + 0.5, y[ys[-1]] + 0.5


def _fit_shapes(alpha: np.ndarray, x: np.ndarray, y: np.ndarray, side: float) -> tuple[str, float, float, float, float]:
    """Fit every shape to a soft mask; returns shape, overlap, radius and center x, y of the best fit, pixels.

    Args:
        alpha: soft mask (h, w) in [0, 1].
        x: pixel centers (w,); ``y``: (h,).
        side: of the whole image.
    """
    # 1. Two fits of each shape: by area and centroid, and by the bounding box. Which is closer depends on noise and blur.
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

    # 2. The fit with the highest overlap; blurred templates for blurred images.
    sharp = np.clip(np.stack(templates) + 0.5, 0, 1)
    blurred = ndimage.gaussian_filter(sharp, (0, BLUR * side, BLUR * side), mode="constant", truncate=3)
    overlaps = np.maximum(_overlap(alpha, sharp), _overlap(alpha, blurred))
    best = int(overlaps.argmax())
    shape, radius, cx, cy = fits[best]
    return shape, float(overlaps[best]), radius, cx, cy


def _fit_letters(alpha: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[str, float, float, float]:
    """Fit every letter to the bounding box of a soft mask; returns letter, overlap and center x, y of the best fit, pixels."""
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
