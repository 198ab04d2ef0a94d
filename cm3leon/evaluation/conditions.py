"""Does an image follow the condition image that it was drawn from? Extract the same kind of condition again, and compare the two.

What any image gives (edges, scribbles, lines) is extracted as for training. What only a scene of shapes gives (segments, depth, normals,
skeletons) is drawn of the scene that is read back from the image; this says something of images of shapes alone.
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
"""A pixel belongs to a line where its brightest channel has at least this, of 255."""
TOLERANCE = 1 / 64
"""Lines this far apart still agree, share of the side."""
TILT = 0.2
"""A normal whose part across the line of sight is longer than this belongs to a tilted surface."""
LINES = frozenset([*EXTRACTORS, "openpose"])


def extract(kind: str, image: Image.Image | np.ndarray) -> np.ndarray:
    """The condition image of an image (PIL, or uint8 (h, w, 3)): uint8 (h, w, 3), or (h, h, 3) of the kinds that are read from a scene.

    Objects whose shape cannot be told are left out.

    Raises:
        ValueError: for a kind that cannot be extracted, or an array of another type or shape.
    """
    pixels = image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB"))
    if kind in EXTRACTORS:
        return EXTRACTORS[kind](pixels)
    _known(kind)
    scene = read_scene(pixels)
    return RENDERERS[kind](replace(scene, objects=tuple(item for item in scene.objects if item.shape != UNKNOWN)), len(pixels))


def agreement(kind: str, asked: np.ndarray, found: np.ndarray) -> float:
    """How well two condition images of one kind agree, from 0 to 1 (alike); 1 where both are empty. uint8 (h, w, 3) each.

    Lines and skeletons: F-measure of their pixels, of which those within :data:`TOLERANCE` of one of the other image count as right.
    Segments: mean intersection over union of the classes, without the background, that either image shows.
    Depth and normals: intersection over union of what is nearer than the plane, or tilted, times one minus the mean difference in the
    union (of brightness as a share of 255; of normals, half the distance between them).

    ``found`` is brought to the size of ``asked`` first, by nearest neighbors.

    Raises:
        ValueError: for an unknown kind.
    """
    _known(kind)
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
    tilted, also = (np.hypot(normal[..., 0], normal[..., 1]) > TILT for normal in (one, other))
    return _surface_agreement(tilted, also, np.linalg.norm(one - other, axis=2) / 2)


def _known(kind: str) -> None:
    if kind not in EXTRACTORS and kind not in RENDERERS:
        raise ValueError(f"no condition of kind {kind!r} can be extracted; known are {', '.join([*EXTRACTORS, *RENDERERS])}")


def _f_measure(asked: np.ndarray, found: np.ndarray) -> float:
    """Harmonic mean of the share of ``found`` that is near ``asked`` and the reverse: bool (h, w) each."""
    if not asked.any() or not found.any():
        return float(asked.any() == found.any())
    reach = TOLERANCE * (asked.shape[0] * asked.shape[1]) ** 0.5
    precision, recall = (
        float((ndimage.distance_transform_edt(~target)[lines] <= reach).mean()) for lines, target in ((found, asked), (asked, found))
    )
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _classes(segments: np.ndarray) -> np.ndarray:
    """Number of the class whose color is nearest, 0 for the background: uint8 (h, w, 3) -> (h, w)."""
    colors = np.array([(0, 0, 0), *SEGMENT_COLORS.values()])
    return ((segments[..., None, :].astype(int) - colors) ** 2).sum(axis=-1).argmin(axis=-1)


def _mean_iou(asked: np.ndarray, found: np.ndarray) -> float:
    """Over the classes from 1 on that either shows: int (h, w) each."""
    shown = np.union1d(asked, found)
    overlaps = [((asked == c) & (found == c)).sum() / ((asked == c) | (found == c)).sum() for c in shown[shown > 0]]
    return float(np.mean(overlaps)) if overlaps else 1.0


def _surface_agreement(asked: np.ndarray, found: np.ndarray, difference: np.ndarray) -> float:
    """Overlap of two foregrounds, bool (h, w), times one minus the mean ``difference`` inside their union, 0 to 1 (h, w)."""
    union = asked | found
    if not union.any():
        return 1.0
    return float((asked & found).sum() / union.sum() * max(0.0, 1 - difference[union].mean()))
