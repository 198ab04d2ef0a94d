"""Scenes of simple shapes: vocabulary, geometry, rendering, spatial relations and sampling.

A scene is a flat background with one to three objects, or with one letter. All lengths are fractions of the image's side, x to the right
and y down, so that a scene renders at any size. Rendering is analytic: a pixel's coverage follows from the signed distance of its center
to the outline, so that edges are antialiased without supersampling.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from cm3leon.utils.errors import ConfigError

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 28, 36),
    "green": (28, 158, 54),
    "blue": (36, 68, 224),
    "yellow": (250, 222, 28),
    "orange": (250, 132, 16),
    "purple": (142, 40, 176),
    "cyan": (28, 208, 222),
    "brown": (122, 72, 34),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "gray": (150, 150, 154),
    "black": (14, 14, 18),
    "pink": (255, 188, 208),
}
SIZES: dict[str, float] = {"small": 0.1, "large": 0.175}
"""Size word -> radius, fraction of the image's side."""
LETTER_SIZE = 0.26
"""Half the height of a letter, fraction of the image's side."""
MARGIN = 0.03
"""Least distance between an object and the image's edge."""
GAP = 0.08
"""Least distance between two objects along at least one axis."""
DOMINANCE = 1.6
"""A spatial relation holds along an axis if the centers are this many times further apart along it than along the other axis."""
OBJECT_WEIGHTS = {1: 0.35, 2: 0.45, 3: 0.2}
"""Number of objects -> probability of it."""
IDENTICAL = {1: 0.0, 2: 0.2, 3: 0.3}
"""Number of objects -> probability that all of them look the same ("two red circles")."""

ARM = 0.37  # half the width of a cross's arms
HOLE = 0.54  # radius of a ring's hole
STROKE = 0.2  # half the width of a letter's strokes
SQRT_HALF = math.sqrt(0.5)

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    side = 0.5 * math.sqrt(3) * np.abs(x) - 0.5 * (y + 1.05)
    return np.maximum(side, y - 0.85)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 1, y - ARM), np.maximum(x - ARM, y - 1))


# A convex polygon is an intersection of half-planes, whose signed distance is the maximum of theirs; a union takes the minimum. Both are
# exact at the edges, where coverage is computed, and a lower bound of the distance beyond corners.
SHAPES: dict[str, Distance] = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.88,
    "triangle": _triangle,
    "diamond": lambda x, y: (np.abs(x) + np.abs(y) - 1.2) * SQRT_HALF,
    "cross": _cross,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - (1 + HOLE) / 2) - (1 - HOLE) / 2,
}
"""Shape -> signed distance from points (x, y), relative to its center, to its outline; negative inside; in units of the radius."""

_HALF_WIDTH = 1.9 / math.sqrt(3)
EXTENTS: dict[str, tuple[float, float, float, float]] = {
    "circle": (-1, -1, 1, 1),
    "square": (-0.88, -0.88, 0.88, 0.88),
    "triangle": (-_HALF_WIDTH, -1.05, _HALF_WIDTH, 0.85),
    "diamond": (-1.2, -1.2, 1.2, 1.2),
    "cross": (-1, -1, 1, 1),
    "ring": (-1, -1, 1, 1),
}
"""Shape -> bounding box x0, y0, x1, y1 around its center, in units of the radius."""

Point = tuple[float, float]


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, stop: float, steps: int = 10) -> list[Point]:
    """An arc of an ellipse as a polyline, from angle ``start`` to ``stop``, degrees clockwise from the x axis."""
    angles = [math.radians(start + (stop - start) * i / steps) for i in range(steps + 1)]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


LETTERS: dict[str, list[list[Point]]] = {
    "A": [[(-0.6, 0.8), (0, -0.8), (0.6, 0.8)], [(-0.4, 0.3), (0.4, 0.3)]],
    "C": [_arc(0.1, 0, 0.7, 0.8, -50, -310)],
    "E": [[(0.5, -0.8), (-0.5, -0.8), (-0.5, 0.8), (0.5, 0.8)], [(-0.5, 0), (0.35, 0)]],
    "H": [[(-0.55, -0.8), (-0.55, 0.8)], [(0.55, -0.8), (0.55, 0.8)], [(-0.55, 0), (0.55, 0)]],
    "L": [[(-0.45, -0.8), (-0.45, 0.8), (0.55, 0.8)]],
    "S": [_arc(0, -0.4, 0.5, 0.4, -25, -270) + _arc(0, 0.4, 0.5, 0.4, -90, 155)],
    "T": [[(-0.6, -0.8), (0.6, -0.8)], [(0, -0.8), (0, 0.8)]],
    "V": [[(-0.6, -0.8), (0, 0.8), (0.6, -0.8)]],
    "X": [[(-0.55, -0.8), (0.55, 0.8)], [(0.55, -0.8), (-0.55, 0.8)]],
    "Z": [[(-0.55, -0.8), (0.55, -0.8), (-0.55, 0.8), (0.55, 0.8)]],
}
"""Letter -> its strokes as polylines, in units of half its height."""


def letter_distance(letter: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance from points (x, y) to the outline of a letter, negative inside, in units of half the letter's height."""
    best = np.full(np.broadcast(x, y).shape, np.inf)
    for stroke in LETTERS[letter]:
        for (ax, ay), (bx, by) in itertools.pairwise(stroke):
            # Project each point on the segment, clip the projection to its ends, and take the distance to it.
            dx, dy = bx - ax, by - ay
            along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
            np.minimum(best, np.hypot(x - ax - along * dx, y - ay - along * dy), out=best)
    return best - STROKE


@cache
def letter_extent(letter: str) -> tuple[float, float, float, float]:
    """Bounding box x0, y0, x1, y1 of a letter around its center, in units of half its height."""
    points = [point for stroke in LETTERS[letter] for point in stroke]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    return min(xs) - STROKE, min(ys) - STROKE, max(xs) + STROKE, max(ys) + STROKE


Content = tuple[str, tuple[tuple[str, str], ...]]
"""A background, and shape (or letter) and color of each object, in order."""
Combination = tuple[str, ...]
"""A color and a shape, or a shape, ``left of`` or ``above``, and the shape that it is left of or above."""


@dataclass(frozen=True)
class Object:
    """A shape, or a letter (``shape`` is then ``"letter"``), with its center (x, y) in fractions of the image's side."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    letter: str | None = None

    @property
    def radius(self) -> float:
        """Unit of the shape's geometry, fraction of the image's side; of a letter, half its height."""
        return LETTER_SIZE if self.letter else SIZES[self.size]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Bounding box x0, y0, x1, y1, fractions of the side."""
        extent = letter_extent(self.letter) if self.letter else EXTENTS[self.shape]
        return (
            self.x + self.radius * extent[0], self.y + self.radius * extent[1],
            self.x + self.radius * extent[2], self.y + self.radius * extent[3],
        )  # fmt: skip

    @property
    def label(self) -> str:
        """The object in words: ``"small red circle"``, ``"red letter A"``."""
        return f"{self.color} letter {self.letter}" if self.letter else f"{self.size} {self.color} {self.shape}"

    def coverage(self, side: int) -> np.ndarray:
        """Fraction of each pixel that the object covers: float64 (side, side) in [0, 1]."""
        centers = (np.arange(side) + 0.5) / side
        x = (centers[None, :] - self.x) / self.radius
        y = (centers[:, None] - self.y) / self.radius
        distance = letter_distance(self.letter, x, y) if self.letter else SHAPES[self.shape](x, y)
        # An edge that runs at a signed distance d (pixels) from a pixel's center covers about 0.5 - d of the pixel.
        return np.clip(0.5 - distance * (self.radius * side), 0, 1)


@dataclass(frozen=True)
class Scene:
    """A background color and the objects on it."""

    background: str
    objects: tuple[Object, ...]

    @property
    def letter(self) -> str | None:
        """The letter of a letter scene, else None."""
        return self.objects[0].letter if self.objects else None

    @property
    def identical(self) -> bool:
        """True if there are several objects and all look the same."""
        return len(self.objects) > 1 and len({item.label for item in self.objects}) == 1

    @property
    def signature(self) -> tuple[Any, ...]:
        """A key that is equal for scenes that look the same: the order of the objects does not matter."""
        return self.background, tuple(sorted((o.label, round(o.x, 4), round(o.y, 4)) for o in self.objects))

    @property
    def content(self) -> Content:
        """What captions say of the scene whatever words they take, without sizes and positions: no caption leaves out more."""
        return self.background, tuple(sorted((item.letter or item.shape, item.color) for item in self.objects))

    @property
    def combinations(self) -> frozenset[Combination]:
        """The colors of shapes, and how shapes lie to each other, apart from letters."""
        shapes = [item for item in self.objects if not item.letter]
        related = [(a.shape, relation(a, b), b.shape) for a, b in itertools.combinations(shapes, 2)]
        return frozenset((item.color, item.shape) for item in shapes) | {directed(a, how, b) for a, how, b in related if how}

    def render(self, side: int) -> np.ndarray:
        """Paint the scene: RGB, uint8 (side, side, 3)."""
        image = np.empty((side, side, 3), np.float32)
        image[:] = BACKGROUNDS[self.background]
        for item in self.objects:
            image += item.coverage(side)[..., None].astype(np.float32) * (np.array(COLORS[item.color], np.float32) - image)
        return (image + 0.5).astype(np.uint8)


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
"""The relation of the second object to the first, by that of the first to the second."""


def relation(first: Object, second: Object) -> str | None:
    """The spatial relation of ``first`` to ``second``: left of, right of, above, below; None if none holds clearly (:data:`DOMINANCE`)."""
    # An axis dominates, and the boxes do not overlap along it: then the relation is true of all pixels of both objects.
    dx, dy = first.x - second.x, first.y - second.y
    a, b = first.box, second.box
    if abs(dx) >= DOMINANCE * abs(dy) and (a[2] <= b[0] or b[2] <= a[0]):
        return "left of" if dx < 0 else "right of"
    if abs(dy) >= DOMINANCE * abs(dx) and (a[3] <= b[1] or b[3] <= a[1]):
        return "above" if dy < 0 else "below"
    return None


def directed(first: str, how: str, second: str) -> Combination:
    """A spatial relation by ``left of`` or ``above``: what is right of or below something has that on its left or above it."""
    return (second, OPPOSITE[how], first) if how in ("right of", "below") else (first, how, second)


def apart(first: Object, second: Object) -> bool:
    """True if the boxes of two objects are at least :data:`GAP` apart along at least one axis."""
    a, b = first.box, second.box
    return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) >= GAP - 1e-9  # less rounding


def is_valid(scene: Scene) -> bool:
    """True if all objects lie inside the image and apart from each other, and differ in color or shape (or all look the same)."""
    for i, item in enumerate(scene.objects):
        if min(item.box[:2]) < MARGIN - 1e-9 or max(item.box[2:]) > 1 - MARGIN + 1e-9:
            return False
        if any(not apart(item, other) for other in scene.objects[:i]):
            return False
    names = {(item.color, item.shape) for item in scene.objects}
    return scene.identical or len(names) == len(scene.objects)


def place(shape: str, color: str, size: str, grid: int, rng: random.Random, letter: str | None = None) -> Object | None:
    """Place an object at a random position where it lies inside the image; None if no grid point allows that.

    Args:
        grid: steps a side; centers lie on multiples of 1 / grid. 0: anywhere.
    """
    extent = Object(shape, color, size, 0.0, 0.0, letter).box

    def sample_coordinate(low: float, high: float) -> float | None:
        if not grid:
            return round(rng.uniform(low, high), 4)
        # The first and last grid point between low and high, up to rounding.
        first, last = math.ceil(low * grid - 1e-9), math.floor(high * grid + 1e-9)
        return rng.randint(first, last) / grid if first <= last else None

    x = sample_coordinate(MARGIN - extent[0], 1 - MARGIN - extent[2])
    y = sample_coordinate(MARGIN - extent[1], 1 - MARGIN - extent[3])
    return None if x is None or y is None else Object(shape, color, size, x, y, letter)


def sample_scene(rng: random.Random, max_objects: int, grid: int, letters: float, attempts: int = 10_000) -> Scene:
    """Sample a valid scene by rejection; two different objects always have a spatial relation (:func:`relation`).

    Args:
        grid: steps a side of the grid on which centers lie; 0: anywhere.
        letters: probability of a scene that shows one letter.
        attempts: scenes that are tried.

    Raises:
        ConfigError: if no valid scene was found, because the grid is too coarse.
    """
    # 1. The kind of scene. It is fixed before any attempt, so that kinds that are rejected more often are not rarer.
    colors, shapes, sizes = list(COLORS), list(SHAPES), list(SIZES)
    is_letter = rng.random() < letters
    counts = [count for count in OBJECT_WEIGHTS if count <= max_objects]
    count = 1 if is_letter else rng.choices(counts, [OBJECT_WEIGHTS[c] for c in counts])[0]
    alike = rng.random() < IDENTICAL[count]

    # 2. Objects, until an attempt is valid.
    for _ in range(attempts):
        objects: list[Object] = []
        names: tuple[str, str, str] | None = None
        while len(objects) < count:
            if names is None or not alike:
                names = rng.choice(shapes), rng.choice(colors), rng.choice(sizes)
            if is_letter:
                item = place("letter", names[1], "large", grid, rng, rng.choice(list(LETTERS)))
            else:
                item = place(*names, grid, rng)
            if item is None or any(not apart(item, other) for other in objects):
                break  # too few objects: the attempt fails below
            objects.append(item)
        scene = Scene(rng.choice(list(BACKGROUNDS)), tuple(objects))
        clear = alike or count != 2 or (len(objects) == 2 and relation(*objects) is not None)
        if len(objects) == count and clear and is_valid(scene):
            return scene
    raise ConfigError(f"no scene of {count} objects fits a grid of {grid} steps a side; raise ingest.shapes.grid or set it to 0")
