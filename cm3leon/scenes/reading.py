"""Read a scene back from an image by classical image analysis: nothing is learned, and every step can be checked.

The background is the border's dominant color; objects are connected regions that differ from it; an object's color is the nearest named
color of the region's core; its soft mask tells how far each pixel lies between background and that color; its shape, size and letter are
those of the template that has the highest intersection over union with the mask. Then what was read is rendered and compared with the
image: where they differ the image has a flaw. An object with a flaw has the shape ``"unknown"``, and a flaw beside the objects is an
object more, so that neither is taken for what a caption states. It works on images of 48 pixels a side and more, also if they are blurred,
noisy or vector-quantized. How many broken pictures it takes for right: ``benchmarks/reader.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

from cm3leon.scenes.scene import (
    BACKGROUNDS,
    COLORS,
    EXTENTS,
    LETTERS,
    SHAPES,
    SIZES,
    Distance,
    Object,
    Scene,
    letter_distance,
    letter_extent,
)

SMALLEST_SIDE, LARGEST_SIDE = 64, 128
"""Other images are resized to one of these sides first, pixels."""
FOREGROUND = 22.0
"""Least CIELAB distance between a pixel of an object and the background."""
SMALLEST_AREA = 0.006
"""Smaller regions are ignored as artifacts, fraction of the image's area; the smallest object of the vocabulary has 0.021."""
LEAST_OVERLAP, LEAST_RING_OVERLAP = 0.86, 0.72
"""Least intersection over union with the template of a shape; a region that has less with all of them has the shape ``"unknown"``. Of a
ring, which is thin, a slight blur takes more."""
LEAST_LETTER_OVERLAP = 0.6
"""The same of a letter."""
FLAWS = ((10.0, 1.5, 0.003), (16.0, 1.0, 0.004), (5.0, 1.5, 0.015))
"""A flaw is a region in which image and rendering differ by at least so much (CIELAB), outside of so many 64ths of the side around edges,
of so large a fraction of the image's area."""
SMOOTHING = 3 / 64
"""Side of the window over which differences are averaged, fraction of the side."""
FARTHEST_COLOR = 22.0
"""Largest CIELAB distance of an object or the background to its named color; beyond it the color is ``"unknown"``."""
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


def _polygon(corners: int, turn: float) -> Distance:
    """A regular polygon with the first corner at the top, turned by an angle; as those of the scenes (:data:`SHAPES`)."""
    normals = [turn + math.pi / 2 + math.pi * (2 * i + 1) / corners for i in range(corners)]
    inner = math.cos(math.pi / corners)
    return lambda x, y: np.maximum.reduce([-x * math.cos(a) - y * math.sin(a) - inner for a in normals])


# Shapes that look like those of the scenes and are none: what fits one of these better is unknown.
_OTHERS = {"pentagon": _polygon(5, 0.0), "hexagon": _polygon(6, 0.0), "hexagon on a side": _polygon(6, math.pi / 6)}
_TEMPLATES = SHAPES | _OTHERS


@cache
def _template_size(shape: str) -> tuple[float, float, float, tuple[float, float, float, float]]:
    """Area, centroid (x, y) and bounding box x0, y0, x1, y1 of a template, in units of its radius, by counting grid points."""
    grid = (np.arange(600) + 0.5) / 600 * 3 - 1.5
    x, y = np.meshgrid(grid, grid)
    inside = _TEMPLATES[shape](x, y) < 0
    box = (x[inside].min(), y[inside].min(), x[inside].max(), y[inside].max()) if shape in _OTHERS else EXTENTS[shape]
    return inside.mean() * 9, x[inside].mean(), y[inside].mean(), box


def read_scene(image: Image.Image | np.ndarray) -> Scene:
    """Read the scene that an image shows.

    Any named color can be read as the background, also those of objects. Shape and color of an object and the color of the background can
    be :data:`UNKNOWN`.

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
    found: list[_Found] = []
    least = SMALLEST_AREA * foreground.size
    for index, window in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[window] == index
        if mask.sum() >= least:
            found += _read_region(pixels, lab, contrast, ground, mask, window, least)

    # 4. What the image shows besides.
    objects = _with_flaws(_difference(lab, ground, found), found)
    return Scene(_color_name(ground, NAMES[background]), tuple(objects))


@dataclass(frozen=True)
class _Found:
    """An object, and the template that fits it.

    Attributes:
        color: RGB of its core.
        radius: unit of the template, pixels; ``x`` and ``y``, its center, likewise.
        template: name of the shape.
    """

    item: Object
    color: np.ndarray
    template: str
    radius: float
    x: float
    y: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Bounding box x0, y0, x1, y1, pixels."""
        e = letter_extent(self.item.letter) if self.item.letter else _template_size(self.template)[3]
        return self.x + self.radius * e[0], self.y + self.radius * e[1], self.x + self.radius * e[2], self.y + self.radius * e[3]

    def distance(self, height: int, width: int) -> np.ndarray:
        """Signed distance of each pixel's center to the template's outline, pixels (height, width)."""
        x, y = (np.arange(width)[None] + 0.5 - self.x) / self.radius, (np.arange(height)[:, None] + 0.5 - self.y) / self.radius
        distance = letter_distance(self.item.letter, x, y) if self.item.letter else _TEMPLATES[self.template](x, y)
        return distance * self.radius


def _difference(lab: np.ndarray, ground: np.ndarray, found: list[_Found]) -> np.ndarray:
    """Where the image differs from a rendering of what was found, in any of the ways of :data:`FLAWS`: bool (h, w)."""
    height, width = lab.shape[:2]
    side = math.sqrt(height * width)
    rendered = np.empty(lab.shape, np.float32)
    rendered[:] = ground
    edge = np.full((height, width), np.inf)
    for one in found:
        distance = one.distance(height, width)
        rendered += np.clip(0.5 - distance, 0, 1)[..., None] * (one.color - rendered)
        edge = np.minimum(edge, np.abs(distance))
    difference = lab - to_lab(np.clip(rendered + 0.5, 0, 255).astype(np.uint8))
    window = max(3, round(SMOOTHING * side))
    flawed = np.zeros((height, width), bool)
    for contrast, margin, area in FLAWS:
        away = difference * (edge > margin * side / 64)[..., None]
        smooth = ndimage.uniform_filter(away, (window, window, 0))
        labels, _ = ndimage.label(np.sqrt((smooth**2).sum(-1)) > contrast)
        large = np.bincount(labels.ravel()) >= area * labels.size
        large[0] = False
        flawed |= large[labels]
    return flawed


def _with_flaws(flawed: np.ndarray, found: list[_Found]) -> list[Object]:
    """The objects: those with a flaw in their box have an unknown shape; flaws beside all boxes are unknown objects."""
    height, width = flawed.shape
    labels, count = ndimage.label(flawed)
    objects = [one.item for one in found]
    for label in range(1, count + 1):
        own = labels == label
        y, x = (positions + 0.5 for positions in np.nonzero(own))
        inside = [((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)).mean() for x0, y0, x1, y1 in (one.box for one in found)]
        if inside and max(inside) >= 0.5:
            position = int(np.argmax(inside))
            objects[position] = replace(objects[position], shape=UNKNOWN, letter=None)
        else:
            radius = math.sqrt(own.mean() / math.pi)
            size = "small" if radius < SIZE_LIMIT else "large"
            objects.append(Object(UNKNOWN, UNKNOWN, size, float(x.mean()) / width, float(y.mean()) / height))
    return objects


def _color_name(color: np.ndarray, name: str) -> str:
    """The name, or :data:`UNKNOWN` if the color (RGB) is too far from that of the name."""
    lab = to_lab(np.clip(color + 0.5, 0, 255).astype(np.uint8)[None])[0]
    return name if np.linalg.norm(lab - _named_lab()[NAMES.index(name)]) <= FARTHEST_COLOR else UNKNOWN


def _as_pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """RGB, uint8 (h, w, 3), with the longer side from :data:`SMALLEST_SIDE` to :data:`LARGEST_SIDE`."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected a uint8 array (height, width, 3), got {image.dtype} {image.shape}")
        image = Image.fromarray(image)
    side = min(max(*image.size, SMALLEST_SIDE), LARGEST_SIDE)
    if side != max(image.size):
        method = Image.Resampling.BOX if side == LARGEST_SIDE else Image.Resampling.BICUBIC
        factor = side / max(image.size)
        image = image.convert("RGB").resize((round(image.width * factor), round(image.height * factor)), method)
    return np.asarray(image.convert("RGB"))


def _read_region(
    pixels: np.ndarray, lab: np.ndarray, contrast: np.ndarray, ground: np.ndarray, mask: np.ndarray, window: tuple[slice, ...], least: float
) -> list[_Found]:
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
    pixels: np.ndarray, ground: np.ndarray, mask: np.ndarray, core: np.ndarray, window: tuple[slice, ...], name: str
) -> _Found:
    """Fit the templates to one region; ``mask`` and ``core`` are its pixels within ``window``."""
    # 1. A window two pixels wider, and a mask one pixel wider: an antialiased or blurred edge extends beyond the region.
    height, width = pixels.shape[:2]
    side = math.sqrt(height * width)
    color = np.median(pixels[window][core], axis=0)
    color_difference = color - ground
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
    name = _color_name(color, name)
    if window[0].stop - window[0].start >= LETTER_HEIGHT * height:
        letter, letter_overlap, half, mx, my = _fit_letters(alpha, x, y)
        if letter_overlap > overlap and letter_overlap >= LEAST_LETTER_OVERLAP:
            return _Found(Object("letter", name, "large", mx / width, my / height, letter), color, "letter", half, mx, my)
    size = "small" if radius < SIZE_LIMIT * side else "large"
    known = shape in SHAPES and overlap >= (LEAST_RING_OVERLAP if shape == "ring" else LEAST_OVERLAP)
    item = Object(shape if known else UNKNOWN, name, size, cx / width, cy / height)
    return _Found(item, color, shape, radius, cx, cy)


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
    for shape, distance in _TEMPLATES.items():
        unit_area, ux, uy, e = _template_size(shape)
        by_area = math.sqrt(area / unit_area)
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


def _fit_letters(alpha: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[str, float, float, float, float]:
    """Fit every letter to the bounding box of a soft mask; returns letter, overlap, half the height and center x, y of the best, pixels."""
    x0, y0, x1, y1 = _box(alpha, x, y)
    fits, templates = [], []
    for letter in LETTERS:
        e = letter_extent(letter)
        half = (y1 - y0) / (e[3] - e[1])
        cx, cy = (x0 + x1 - half * (e[0] + e[2])) / 2, (y0 + y1 - half * (e[1] + e[3])) / 2
        fits.append((half, cx, cy))
        templates.append(letter_distance(letter, (x[None] - cx) / half, (y[:, None] - cy) / half) * -half)
    overlaps = _overlap(alpha, np.clip(np.stack(templates) + 0.5, 0, 1))
    best = int(overlaps.argmax())
    return list(LETTERS)[best], float(overlaps[best]), *fits[best]
