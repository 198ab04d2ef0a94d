"""Condition images of a scene of shapes: those that only the scene itself tells exactly, and all kinds together.

In depth and normals, every object is a solid before a plane: a circle is half a ball, a ring half a torus, a letter a bent half tube,
triangle and diamond are pyramids, square and cross have a flat top and sloping sides. In ``openpose``, every shape has a skeleton of its
own; a letter's is its strokes.
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
"""Color of each class in a segmentation map; the background is black."""

FAR, NEAR = 32, 96
"""Brightness in a depth map of the plane behind the objects, and of the lowest point of an object."""
TALLEST = SIZES["large"]
"""Height that is white in a depth map, share of the side: that of the large ball."""


def segmentation_map(scene: Scene, side: int) -> np.ndarray:
    """Every object filled with the color of its shape's class on black, uint8 (side, side, 3)."""
    pixels = np.zeros((side, side, 3), np.uint8)
    for item in scene.objects:
        pixels[item.coverage(side) >= 0.5] = SEGMENT_COLORS[item.shape]
    return pixels


def _round(radius: float) -> Callable[[np.ndarray], np.ndarray]:
    """Profile of a half circle that ``radius`` inside the outline is highest."""
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
"""Class -> height over its foot by the distance to the outline from inside, both in units of the radius."""


def _height(item: Object, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Height of an object's solid at places around its center, all in units of its radius, and which places it covers."""
    inside = -(letter_distance(item.letter, x, y) if item.letter else SHAPES[item.shape](x, y))
    return PROFILES[item.shape](np.maximum(inside, 0)), inside >= 0


def _solids(scene: Scene, side: int) -> Iterator[tuple[Object, tuple[slice, slice], np.ndarray, np.ndarray]]:
    """Each object, the window of pixels that it lies in, and places x (1, w), y (h, 1) of their centers in units of its radius."""
    centers = (np.arange(side) + 0.5) / side
    for item in scene.objects:
        x0, y0, x1, y1 = (round(value * side) for value in item.box)
        window = slice(max(y0 - 1, 0), max(y1 + 1, 0)), slice(max(x0 - 1, 0), max(x1 + 1, 0))
        x, y = (centers[window[1]] - item.x) / item.radius, (centers[window[0]] - item.y) / item.radius
        yield item, window, x[None, :], y[:, None]


def heights(scene: Scene, side: int) -> np.ndarray:
    """Height of the objects' solids over their foot, shares of the side, NaN where there is no object: (side, side)."""
    field = np.full((side, side), np.nan)
    for item, window, x, y in _solids(scene, side):
        height, covered = _height(item, x, y)
        field[window][covered] = height[covered] * item.radius
    return field


def depth(scene: Scene, side: int) -> np.ndarray:
    """The nearer, the brighter: the plane has :data:`FAR`, objects :data:`NEAR` and more, gray uint8 (side, side, 3)."""
    field = heights(scene, side)
    brightness = np.where(np.isnan(field), FAR, NEAR + (255 - NEAR) * field / TALLEST)
    return np.repeat((brightness + 0.5).astype(np.uint8)[..., None], 3, axis=2)


def normals(scene: Scene, side: int, step: float = 1e-3) -> np.ndarray:
    """Unit normals (x right, y up, z to the viewer) of the surfaces, encoded as (n + 1) / 2 * 255, uint8 (side, side, 3).

    ``step``: length over which slopes are taken, in units of an object's radius.
    """
    field = np.broadcast_to(np.array([0.0, 0.0, 1.0]), (side, side, 3)).copy()
    for item, window, x, y in _solids(scene, side):
        _, covered = _height(item, x, y)
        right, down = (
            (_height(item, x + dx, y + dy)[0] - _height(item, x - dx, y - dy)[0]) / (2 * step) for dx, dy in ((step, 0), (0, step))
        )
        normal = np.stack([-right, down, np.ones_like(right)], axis=-1)
        field[window][covered] = (normal / np.linalg.norm(normal, axis=-1, keepdims=True))[covered]
    return ((field + 1) / 2 * 255 + 0.5).astype(np.uint8)


def _star(count: int, length: float, first: float) -> list[list[Point]]:
    """``count`` limbs from the center, evenly spread from the angle ``first``, degrees."""
    angles = [math.radians(first + 360 * i / count) for i in range(count)]
    return [[(0, 0), (length * math.cos(a), length * math.sin(a))] for a in angles]


def _loop(count: int, length: float) -> list[list[Point]]:
    """``count`` limbs around the center, its corners at distance ``length``, one of them at the top."""
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
    """An object's chains of limbs in units of its radius; a letter's arcs have six limbs."""
    if item.letter is None:
        return SKELETONS[item.shape]
    return [[stroke[round(i)] for i in np.linspace(0, len(stroke) - 1, min(len(stroke), 7))] for stroke in LETTERS[item.letter]]


def openpose(scene: Scene, side: int, fine: int = 4) -> np.ndarray:
    """Skeletons as OpenPose draws people: colored limbs, brighter joints, on black, uint8 (side, side, 3).

    Each class has hues of its own, each limb one of them. Drawn ``fine`` times larger and reduced.
    """
    scale = side * fine
    image = Image.new("RGB", (scale, scale))
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        chains = [[((item.x + item.radius * x) * scale, (item.y + item.radius * y) * scale) for x, y in c] for c in _skeleton(item)]
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
"""Kind of condition (``cm3leon.data.tokens.CONDITIONS``) -> what draws it of a scene."""


def conditions(scene: Scene, side: int) -> dict[str, np.ndarray]:
    """All kinds of condition images of a scene, uint8 (side, side, 3) each."""
    pixels = scene.render(side)
    return {kind: draw(scene, side) for kind, draw in RENDERERS.items()} | {kind: make(pixels) for kind, make in EXTRACTORS.items()}
