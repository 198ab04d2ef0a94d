"""Agreement of a generated image with its condition image: extract a condition image of the same kind from it, and compare the two.

Kinds that any image has (edges, scribbles, lines) are extracted as for training. The others (segmentation, depth, normals, skeletons) are
rendered from the scene that is read back from the image, and so are meaningful for images of scenes only.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image
from scipy import ndimage

from cm3leon.data.conditions import EXTRACTORS
from cm3leon.scenes.conditions import FAR, NEAR, RENDERERS, SEGMENT_COLORS
from cm3leon.scenes.reading import UNKNOWN, read_scene

BRIGHT = 80
"""Pixels whose brightest channel has at least this, of 255, belong to a line."""
TOLERANCE = 1 / 64
"""Largest distance at which pixels of lines match, fraction of the side."""
TILT = 0.2
"""Normals whose component across the line of sight is longer than this belong to a tilted surface."""
LINES = frozenset([*EXTRACTORS, "openpose"])
"""Kinds that are compared as lines."""


def extract(kind: str, image: Image.Image | np.ndarray) -> np.ndarray:
    """Extract a condition image.

    Objects whose shape cannot be read are left out.

    Args:
        image: a PIL image, or RGB as uint8 (h, w, 3).

    Returns:
        uint8 (h, w, 3); for kinds that are rendered from a scene (h, h, 3).

    Raises:
        ValueError: if the kind cannot be extracted, or an array has another type or shape.
    """
    pixels = image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB"))
    if kind in EXTRACTORS:
        return EXTRACTORS[kind](pixels)
    _check_kind(kind)
    scene = read_scene(pixels)
    return RENDERERS[kind](replace(scene, objects=tuple(item for item in scene.objects if item.shape != UNKNOWN)), len(pixels))


def agreement(kind: str, asked: np.ndarray, found: np.ndarray) -> float:
    """Agreement of two condition images of the same kind, 0 to 1; higher is better, 1 if both are empty.

    Lines and skeletons: F-measure of their pixels; a pixel is right if the other image has one within :data:`TOLERANCE`.
    Segmentation: mean IoU over the classes that either image shows, without the background.
    Depth and normals: IoU of the foregrounds (nearer than the plane; tilted) times one minus the mean difference in their union. The
    difference is that of gray levels as a fraction of 255, or half the Euclidean distance of unit normals.

    Args:
        asked: the requested condition image, uint8 (h, w, 3).
        found: the extracted one, uint8; it is resized to the size of ``asked`` by nearest neighbor.

    Raises:
        ValueError: if the kind is unknown.
    """
    _check_kind(kind)
    if found.shape != asked.shape:
        found = np.asarray(Image.fromarray(found).resize((asked.shape[1], asked.shape[0]), Image.Resampling.NEAREST))
    if kind in LINES:
        return _f_measure(asked.max(axis=2) >= BRIGHT, found.max(axis=2) >= BRIGHT)
    if kind == "segmentation map":
        return _mean_iou(_classes(asked), _classes(found))
    if kind == "depth":
        one, other = (pixels.mean(axis=2) for pixels in (asked, found))
        return _surface_agreement(one >= (FAR + NEAR) / 2, other >= (FAR + NEAR) / 2, np.abs(one - other) / 255)
    one, other = (pixels / 127.5 - 1 for pixels in (asked, found))
    tilted, other_tilted = (np.hypot(normal[..., 0], normal[..., 1]) > TILT for normal in (one, other))
    return _surface_agreement(tilted, other_tilted, np.linalg.norm(one - other, axis=2) / 2)


def _check_kind(kind: str) -> None:
    if kind not in EXTRACTORS and kind not in RENDERERS:
        raise ValueError(f"no condition image of kind {kind!r} can be extracted; the kinds are {', '.join([*EXTRACTORS, *RENDERERS])}")


def _f_measure(asked: np.ndarray, found: np.ndarray) -> float:
    """Harmonic mean of precision (pixels of ``found`` near ``asked``) and recall (the reverse): boolean (h, w) each."""
    if not asked.any() or not found.any():
        return float(asked.any() == found.any())
    reach = TOLERANCE * (asked.shape[0] * asked.shape[1]) ** 0.5
    precision, recall = (
        float((ndimage.distance_transform_edt(~target)[lines] <= reach).mean()) for lines, target in ((found, asked), (asked, found))
    )
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _classes(segments: np.ndarray) -> np.ndarray:
    """Index of the class with the nearest color, 0 for the background: uint8 (h, w, 3) -> int64 (h, w)."""
    colors = np.array([(0, 0, 0), *SEGMENT_COLORS.values()])
    return ((segments[..., None, :].astype(int) - colors) ** 2).sum(axis=-1).argmin(axis=-1)


def _mean_iou(asked: np.ndarray, found: np.ndarray) -> float:
    """Mean IoU over the classes that either map shows, without the background (0): int64 (h, w) each."""
    shown = np.union1d(asked, found)
    overlaps = [((asked == c) & (found == c)).sum() / ((asked == c) | (found == c)).sum() for c in shown[shown > 0]]
    return float(np.mean(overlaps)) if overlaps else 1.0


def _surface_agreement(asked: np.ndarray, found: np.ndarray, difference: np.ndarray) -> float:
    """IoU of two foregrounds, boolean (h, w), times one minus the mean ``difference``, (h, w) in [0, 1], over their union."""
    union = asked | found
    if not union.any():
        return 1.0
    return float((asked & found).sum() / union.sum() * max(0.0, 1 - difference[union].mean()))
