"""Condition images of a scene: segmentation, depth, normals and skeletons, rendered from the scene itself as exact ground truth.

In depth and normal maps every object is a solid in front of a plane: a circle is a hemisphere, a ring half a torus, a letter a bent half
cylinder, triangle and diamond are pyramids, square and cross have a flat top and sloping sides. In ``openpose`` every shape has a
skeleton of its own; that of a letter is its strokes. The kinds that any image has (edges, scribbles) are extracted from the rendered
image by ``cm3leon.data.conditions``.
"""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageDraw

from cm3leon.data.conditions import EXTRACTORS
from cm3leon.scenes.scene import COLORS, HOLE, LETTERS, SHAPES, SIZES, STROKE, Object, Point, Scene, letter_distance

CLASSES = [*SHAPES, "letter"]
SEGMENT_COLORS = dict(zip(CLASSES, [*list(COLORS.values())[:6], (255, 255, 255)], strict=True))
"""RGB of each class in a segmentation map; the background is black."""

FAR, NEAR = 32, 96
"""Gray levels in a depth map: the plane of the background, and the lowest point of an object."""
TALLEST = SIZES["large"]
"""Height that is white in a depth map, fraction of the side: that of the large hemisphere."""


def segmentation_map(scene: Scene, side: int) -> np.ndarray:
    """Objects filled with the color of their class on black: uint8 (side, side, 3)."""
    pixels = np.zeros((side, side, 3), np.uint8)
    for item in scene.objects:
        pixels[item.coverage(side) >= 0.5] = SEGMENT_COLORS[item.shape]
    return pixels


def _round(radius: float) -> Callable[[np.ndarray], np.ndarray]:
    """Profile of a semicircle, highest at the distance ``radius`` from the outline: h^2 = d (2 r - d)."""
    return lambda inside: np.sqrt(np.maximum(inside * (2 * radius - inside), 0))


PROFILES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "circle": _round(1),
    "square": lambda inside: np.minimum(1.2 * inside, 0.5),
    "triangle": lambda inside: 1.2 * inside,
    "diamond": lambda inside: inside,
    "cross": lambda inside: np.minimum(1.5 * inside, 0.35),
    "ring": _round((1 - HOLE) / 2),
    "letter": _round(STROKE),
}
"""Class -> height above its base by the distance d from the outline inwards, both in units of the object's radius."""


def _height(item: Object, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Height of an object's solid at points (x, y) relative to its center, all in units of its radius; and whether it covers the points."""
    inside = -(letter_distance(item.letter, x, y) if item.letter else SHAPES[item.shape](x, y))
    return PROFILES[item.shape](np.maximum(inside, 0)), inside >= 0


def _solids(scene: Scene, side: int) -> Iterator[tuple[Object, tuple[slice, slice], np.ndarray, np.ndarray]]:
    """Each object, the window of pixels around it, and their centers x (1, w), y (h, 1) relative to its own, in units of its radius."""
    centers = (np.arange(side) + 0.5) / side
    for item in scene.objects:
        x0, y0, x1, y1 = (round(value * side) for value in item.box)
        # Rounding may lose a pixel, hence one more on each side; a negative bound would count from the other end.
        window = slice(max(y0 - 1, 0), max(y1 + 1, 0)), slice(max(x0 - 1, 0), max(x1 + 1, 0))
        x = (centers[window[1]] - item.x) / item.radius
        y = (centers[window[0]] - item.y) / item.radius
        yield item, window, x[None, :], y[:, None]


def heights(scene: Scene, side: int) -> np.ndarray:
    """Height of the objects' solids above their base, fractions of the side, NaN where there is no object: float64 (side, side)."""
    field = np.full((side, side), np.nan)
    for item, window, x, y in _solids(scene, side):
        height, covered = _height(item, x, y)
        field[window][covered] = height[covered] * item.radius
    return field


def depth(scene: Scene, side: int) -> np.ndarray:
    """Depth map, brighter where nearer: :data:`FAR` for the plane, :data:`NEAR` to 255 for objects; gray, uint8 (side, side, 3)."""
    field = heights(scene, side)
    brightness = np.where(np.isnan(field), FAR, NEAR + (255 - NEAR) * field / TALLEST)
    return np.repeat((brightness + 0.5).astype(np.uint8)[..., None], 3, axis=2)


def normals(scene: Scene, side: int, step: float = 1e-3) -> np.ndarray:
    """Normal map: unit normals (x right, y up, z towards the viewer) as (n + 1) / 2 * 255, uint8 (side, side, 3).

    Args:
        step: step of the central differences that give the slopes, in units of an object's radius.
    """
    field = np.broadcast_to(np.array([0.0, 0.0, 1.0]), (side, side, 3)).copy()
    for item, window, x, y in _solids(scene, side):
        _, covered = _height(item, x, y)
        right, down = (
            (_height(item, x + dx, y + dy)[0] - _height(item, x - dx, y - dy)[0]) / (2 * step) for dx, dy in ((step, 0), (0, step))
        )
        # The surface z = h(x, y) has the normal (-dh/dx, -dh/dy, 1); y points down in pixels and up in the map.
        normal = np.stack([-right, down, np.ones_like(right)], axis=-1)
        field[window][covered] = (normal / np.linalg.norm(normal, axis=-1, keepdims=True))[covered]
    return ((field + 1) / 2 * 255 + 0.5).astype(np.uint8)


def _star(count: int, length: float, first: float) -> list[list[Point]]:
    """``count`` limbs of the same length from the center, evenly spaced from the angle ``first``, degrees."""
    angles = [math.radians(first + 360 * i / count) for i in range(count)]
    return [[(0, 0), (length * math.cos(a), length * math.sin(a))] for a in angles]


def _loop(count: int, length: float) -> list[list[Point]]:
    """``count`` limbs that form a regular polygon around the center, its corners at distance ``length``, one of them at the top."""
    angles = [math.radians(360 * i / count - 90) for i in range(count + 1)]
    return [[(length * math.cos(a), length * math.sin(a)) for a in angles]]


SKELETONS: dict[str, list[list[Point]]] = {
    "circle": _star(5, 0.85, -90),
    "square": _star(4, 0.88 * math.sqrt(2) * 0.85, -45),
    "triangle": [[(0, 0.217), end] for end in ((0, -0.85), (0.9, 0.72), (-0.9, 0.72))],
    "diamond": [*_loop(4, 0.95), [(0, -0.95), (0, 0.95)]],
    "cross": _star(4, 0.9, 0),
    "ring": _loop(6, (1 + HOLE) / 2),
}
"""Shape -> chains of limbs through the joints of its skeleton, in units of the radius."""


def _skeleton(item: Object) -> list[list[Point]]:
    """An object's chains of limbs in units of its radius; a letter's stroke has at most six limbs."""
    if item.letter is None:
        return SKELETONS[item.shape]
    return [[stroke[round(i)] for i in np.linspace(0, len(stroke) - 1, min(len(stroke), 7))] for stroke in LETTERS[item.letter]]


def openpose(scene: Scene, side: int, fine: int = 4) -> np.ndarray:
    """Skeletons in the style of OpenPose: colored limbs and brighter joints on black, uint8 (side, side, 3).

    Each class has a range of hues of its own, each limb a hue in it.

    Args:
        fine: factor of supersampling, for antialiased lines.
    """
    scale = side * fine
    image = Image.new("RGB", (scale, scale))
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        chains = [[((item.x + item.radius * x) * scale, (item.y + item.radius * y) * scale) for x, y in chain] for chain in _skeleton(item)]
        limbs = [limb for chain in chains for limb in itertools.pairwise(chain)]
        hues = [(CLASSES.index(item.shape) + 0.7 * i / len(limbs)) / len(CLASSES) for i in range(len(limbs))]
        for (start, end), hue in zip(limbs, hues, strict=True):
            draw.line([start, end], fill=_rgb(hue, 0.8), width=max(fine, round(scale / 45)))
        for limb, hue in zip(limbs, hues, strict=True):
            for x, y in limb:
                draw.circle((x, y), scale / 60, fill=_rgb(hue, 1.0))
    return np.asarray(image.reduce(fine))


def _rgb(hue: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, 1, value)
    return round(red * 255), round(green * 255), round(blue * 255)


RENDERERS: dict[str, Callable[[Scene, int], np.ndarray]] = {
    "segmentation map": segmentation_map, "openpose": openpose, "depth": depth, "3D norm": normals,
}  # fmt: skip
"""Kind of condition (``cm3leon.sequence.tasks.CONDITIONS``) -> function of (scene, side) that renders it."""


def conditions(scene: Scene, side: int) -> dict[str, np.ndarray]:
    """Condition images of all kinds, uint8 (side, side, 3) each: rendered from the scene, or extracted from its image."""
    pixels = scene.render(side)
    rendered = {kind: render(scene, side) for kind, render in RENDERERS.items()}
    return rendered | {kind: extract(pixels) for kind, extract in EXTRACTORS.items()}
