"""Pictures of scenes that are broken: with another shape, a part missing or in another color, or something that nobody named.

Each function of :data:`KINDS` samples a scene and paints it broken. ``python -m benchmarks.broken_scenes OUT.png`` writes a sheet with one
of each kind.
"""

from __future__ import annotations

import functools
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from cm3leon.scenes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES, Distance, Object, Point, Scene, sample_scene
from cm3leon.utils.images import save_captioned

SIDE, GRID = 64, 8
"""Side of a picture, pixels, and steps of the grid of objects' centers."""
Broken = tuple[Scene, np.ndarray]
"""A scene, and a picture that does not show it: uint8 (SIDE, SIDE, 3)."""


# --- other shapes: signed distances as those of the scenes ---------------------------------------------------------------


def _polygon(points: Sequence[Point]) -> Distance:
    """Signed distance to a simple polygon."""

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = np.broadcast_arrays(x, y)
        nearest, inside = np.full(x.shape, np.inf), np.zeros(x.shape, bool)
        for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
            dx, dy = bx - ax, by - ay
            along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
            nearest = np.minimum(nearest, np.hypot(x - ax - along * dx, y - ay - along * dy))
            if dy:  # a ray to the right crosses the edge
                inside ^= ((ay > y) != (by > y)) & (x < dx * (y - ay) / dy + ax)
        return np.where(inside, -nearest, nearest)

    return distance


def _star(points: int, outer: float, inner: float) -> Distance:
    radii = [outer, outer * inner] * points
    return _polygon([(r * math.sin(math.pi * i / points), -r * math.cos(math.pi * i / points)) for i, r in enumerate(radii)])


def _turned(shape: Distance, degrees: float) -> Distance:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return lambda x, y: shape(c * x + s * y, c * y - s * x)


def _circle(cx: float, cy: float, radius: float) -> Distance:
    return lambda x, y: np.hypot(x - cx, y - cy) - radius


def _box(x0: float, y0: float, x1: float, y1: float) -> Distance:
    return lambda x, y: np.maximum(np.maximum(x0 - x, x - x1), np.maximum(y0 - y, y - y1))


def _both(*shapes: Distance) -> Distance:
    return lambda x, y: np.minimum.reduce([shape(x, y) for shape in shapes])


def _without(shape: Distance, hole: Distance) -> Distance:
    return lambda x, y: np.maximum(shape(x, y), -hole(x, y))


OTHER_SHAPES: dict[str, Distance] = {
    "star of four points": _star(4, 1.3, 0.4),
    "star of five points": _star(5, 1.2, 0.5),
    "star of six points": _star(6, 1.2, 0.58),
    "pentagon": _star(5, 1.1, math.cos(math.pi / 5)),
    "hexagon": _star(6, 1.1, math.cos(math.pi / 6)),
    "triangle upside down": _turned(SHAPES["triangle"], 180),
    "triangle to the side": _turned(SHAPES["triangle"], 90),
    "right triangle": _polygon([(-1, -1), (-1, 1), (1, 1)]),
    "trapezoid": _polygon([(-0.55, -0.8), (0.55, -0.8), (1.15, 0.8), (-1.15, 0.8)]),
    "parallelogram": _polygon([(-0.6, -0.75), (1.3, -0.75), (0.6, 0.75), (-1.3, 0.75)]),
    "rectangle": _box(-1.2, -0.65, 1.2, 0.65),
    "ellipse": lambda x, y: (np.hypot(x / 1.3, y / 0.75) - 1) * 0.75,
    "half circle": _without(SHAPES["circle"], _box(-2, 0, 2, 2)),
    "crescent": _without(SHAPES["circle"], _circle(0.5, 0, 0.8)),
    "heart": _both(_circle(-0.5, -0.3, 0.55), _circle(0.5, -0.3, 0.55), _polygon([(-1.02, -0.1), (1.02, -0.1), (0, 1.1)])),
    "arrow": _both(_polygon([(0, -1.1), (1, 0), (-1, 0)]), _box(-0.4, -0.1, 0.4, 1.1)),
    "frame": _without(_box(-0.95, -0.95, 0.95, 0.95), _box(-0.5, -0.5, 0.5, 0.5)),
    "square with a round hole": _without(SHAPES["square"], _circle(0, 0, 0.45)),
    "checkered square": _both(_box(-0.9, -0.9, 0, 0), _box(0, 0, 0.9, 0.9)),
    "X": _turned(SHAPES["cross"], 45),
    "C": _without(SHAPES["ring"], _box(0, -0.35, 2, 0.35)),
    "L": _both(_box(-0.9, -0.9, -0.1, 0.9), _box(-0.9, 0.1, 0.9, 0.9)),
    "T": _both(_box(-0.95, -0.95, 0.95, -0.3), _box(-0.35, -0.95, 0.35, 0.95)),
    "H": _both(_box(-0.9, -0.9, -0.3, 0.9), _box(0.3, -0.9, 0.9, 0.9), _box(-0.9, -0.3, 0.9, 0.3)),
}


# --- painting --------------------------------------------------------------------------------------------------------


def _coverage(shape: Distance, item: Object, radius: float | None = None) -> np.ndarray:
    """Fraction of each pixel that a shape covers in an object's place: (SIDE, SIDE)."""
    centers, unit = (np.arange(SIDE) + 0.5) / SIDE, radius or item.radius
    return np.clip(0.5 - shape((centers[None] - item.x) / unit, (centers[:, None] - item.y) / unit) * unit * SIDE, 0, 1)


def _over(image: np.ndarray, coverage: np.ndarray, color: str) -> np.ndarray:
    result: np.ndarray = image + coverage[..., None] * (np.array(COLORS[color], float) - image)
    return result


def _painted(scene: Scene, coverages: Sequence[np.ndarray], ground: np.ndarray | None = None) -> np.ndarray:
    """The scene with these coverages of its objects, as floats."""
    image = np.empty((SIDE, SIDE, 3))
    image[:] = BACKGROUNDS[scene.background] if ground is None else ground
    for item, coverage in zip(scene.objects, coverages, strict=True):
        image = _over(image, coverage, item.color)
    return image


def _sampled(rng: random.Random) -> tuple[Scene, int, list[np.ndarray]]:
    """A scene without letters, one of its objects, and the coverages of all."""
    scene = sample_scene(rng, 3, GRID, 0)
    return scene, rng.randrange(len(scene.objects)), [item.coverage(SIDE) for item in scene.objects]


def _quarter(item: Object, rng: random.Random) -> np.ndarray:
    """The pixels of one quarter of an object's box."""
    centers, (x0, y0, x1, y1) = (np.arange(SIDE) + 0.5) / SIDE, item.box
    right, lower = rng.choice([-1, 1]), rng.choice([-1, 1])
    return ((centers - (x0 + x1) / 2) * right > 0)[None] & ((centers - (y0 + y1) / 2) * lower > 0)[:, None]


def _free_place(scene: Scene, rng: random.Random, radius: float) -> Object | None:
    """A place of this radius beside all objects."""
    for _ in range(200):
        x, y = (rng.uniform(radius + 0.02, 0.98 - radius) for _ in range(2))
        if all(math.hypot(item.x - x, item.y - y) > radius + 1.35 * item.radius for item in scene.objects):
            return Object(rng.choice(list(SHAPES)), rng.choice(list(COLORS)), "small", x, y)
    return None


def _pixels(image: np.ndarray) -> np.ndarray:
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


# --- kinds of broken pictures ----------------------------------------------------------------------------------------


def other_shape(name: str, rng: random.Random) -> Broken:
    """One object has a shape that is none of the vocabulary."""
    scene, broken, coverages = _sampled(rng)
    coverages[broken] = _coverage(OTHER_SHAPES[name], scene.objects[broken])
    return scene, _pixels(_painted(scene, coverages))


def quarter_missing(rng: random.Random) -> Broken:
    """One object lacks a quarter."""
    scene, broken, coverages = _sampled(rng)
    coverages[broken] = coverages[broken] * ~_quarter(scene.objects[broken], rng)
    return scene, _pixels(_painted(scene, coverages))


def quarter_in_another_color(rng: random.Random) -> Broken:
    """A quarter of one object has another color."""
    scene, broken, coverages = _sampled(rng)
    item = scene.objects[broken]
    color = rng.choice([name for name in COLORS if name != item.color])
    return scene, _pixels(_over(_painted(scene, coverages), coverages[broken] * _quarter(item, rng), color))


def stray_dots(rng: random.Random) -> Broken:
    """One to four dots of any color beside the objects."""
    scene, _, coverages = _sampled(rng)
    image = _painted(scene, coverages)
    for _ in range(rng.randint(1, 4)):
        radius = rng.uniform(0.025, 0.045)
        if place := _free_place(scene, rng, radius):
            image = _over(image, _coverage(SHAPES["circle"], place, radius), place.color)
    return scene, _pixels(image)


def ghost(opacity: float, rng: random.Random) -> Broken:
    """An object more, which can be seen through."""
    while True:
        scene, _, coverages = _sampled(rng)
        size = rng.choice(list(SIZES))
        if place := _free_place(scene, rng, SIZES[size] * 1.1):
            item = replace(place, size=size)
            return scene, _pixels(_over(_painted(scene, coverages), item.coverage(SIDE) * opacity, item.color))


def faint_object(rng: random.Random) -> Broken:
    """One object can be seen through by half."""
    scene, broken, coverages = _sampled(rng)
    coverages[broken] = coverages[broken] / 2
    return scene, _pixels(_painted(scene, coverages))


def background_of_two_colors(rng: random.Random) -> Broken:
    """A stripe or a corner of the background has another color."""
    scene, _, coverages = _sampled(rng)
    ground, width = np.empty((SIDE, SIDE, 3)), round(SIDE * rng.uniform(0.15, 0.4))
    ground[:] = BACKGROUNDS[scene.background]
    rows, columns = rng.choice([(width, SIDE), (SIDE, width), (2 * width, width)])
    ground[:rows, :columns] = BACKGROUNDS[rng.choice([name for name in BACKGROUNDS if name != scene.background])]
    return scene, _pixels(_painted(scene, coverages, ground))


KINDS: dict[str, Callable[[random.Random], Broken]] = {
    **{name: functools.partial(other_shape, name) for name in OTHER_SHAPES},
    "a quarter of an object missing": quarter_missing,
    "a quarter of an object in another color": quarter_in_another_color,
    "one to four stray dots": stray_dots,
    "an object more, at 20 % opacity": functools.partial(ghost, 0.2),
    "an object more, at 40 % opacity": functools.partial(ghost, 0.4),
    "an object at 50 % opacity": faint_object,
    "a background of two colors": background_of_two_colors,
}


if __name__ == "__main__":
    images = [Image.fromarray(make(random.Random(0))[1]) for make in KINDS.values()]
    save_captioned(images, list(KINDS), Path(sys.argv[1]))
