"""Whether an image follows its condition image: the same kind of condition is extracted from the image, and the two are compared.

Kinds that any image has (edges, scribbles, lines) are extracted as for training. Kinds that only a scene of shapes has (segments, depth,
normals, skeletons) are rendered from the scene that is read back from the image, so their agreement is meaningful for such images only.
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
"""A pixel belongs to a line if its brightest channel has at least this value, of 255."""
TOLERANCE = 1 / 64
"""Distance at which two lines still agree, as a fraction of the side."""
TILT = 0.2
"""A normal whose component perpendicular to the line of sight is longer than this belongs to a tilted surface."""
LINES = frozenset([*EXTRACTORS, "openpose"])


def extract(kind: str, image: Image.Image | np.ndarray) -> np.ndarray:
    """The condition image of an image (PIL, or uint8 (h, w, 3)): uint8 (h, w, 3), or (h, h, 3) for kinds that are rendered from a scene.

    Objects whose shape is not recognized are left out.

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
    """Agreement of two condition images of one kind, 0 to 1; 1 if both are empty. uint8 (h, w, 3) each.

    Lines and skeletons: F-measure of their pixels; a pixel within :data:`TOLERANCE` of one of the other image is correct.
    Segments: mean IoU of the classes in either image, without the background.
    Depth and normals: IoU of the regions that are nearer than the plane, or tilted, times one minus the mean difference inside their union
    (for depth, of brightness as a fraction of 255; for normals, half of the distance between them).

    ``found`` is resized to ``asked`` first, by nearest neighbor.

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
    """Harmonic mean of precision (``found`` near ``asked``) and recall (the reverse); bool (h, w) each."""
    if not asked.any() or not found.any():
        return float(asked.any() == found.any())
    reach = TOLERANCE * (asked.shape[0] * asked.shape[1]) ** 0.5
    precision, recall = (
        float((ndimage.distance_transform_edt(~target)[lines] <= reach).mean()) for lines, target in ((found, asked), (asked, found))
    )
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _classes(segments: np.ndarray) -> np.ndarray:
    """Class of each pixel by nearest color, 0 for the background: uint8 (h, w, 3) to int (h, w)."""
    colors = np.array([(0, 0, 0), *SEGMENT_COLORS.values()])
    return ((segments[..., None, :].astype(int) - colors) ** 2).sum(axis=-1).argmin(axis=-1)


def _mean_iou(asked: np.ndarray, found: np.ndarray) -> float:
    """Mean IoU over the classes from 1 on that are in either image; int (h, w) each."""
    shown = np.union1d(asked, found)
    overlaps = [((asked == c) & (found == c)).sum() / ((asked == c) | (found == c)).sum() for c in shown[shown > 0]]
    return float(np.mean(overlaps)) if overlaps else 1.0


def _surface_agreement(asked: np.ndarray, found: np.ndarray, difference: np.ndarray) -> float:
    """IoU of two foregrounds, bool (h, w), times one minus the mean of ``difference`` (h, w), 0 to 1, inside their union."""
    union = asked | found
    if not union.any():
        return 1.0
    return float((asked & found).sum() / union.sum() * max(0.0, 1 - difference[union].mean()))
