"""Scores of edits: was the requested change made, and was everything else kept?

In scenes this is judged object by object (:func:`judge`). For any image, :func:`psnr_outside` compares the pixels outside the region that
the true edit changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from cm3leon.scenes.scene import Object, Scene

SAME_POSITION = 0.1
"""Objects whose centers are at most this far apart have the same position, fraction of the side."""
CHANGED = 12
"""Pixels of which a channel differs by more than this, of 255, between an image and its true edit are in the changed region."""
AROUND = 2
"""Pixels by which the changed region is dilated."""


@dataclass(frozen=True)
class Judgment:
    """Verdict on one edited image.

    Attributes:
        done: the requested change was made.
        kept: everything that the edit does not concern is unchanged, and nothing was added to it.
    """

    done: bool
    kept: bool


def _label(item: Object) -> tuple[str | None, ...]:
    """The look of an object: all but its position."""
    return item.shape, item.color, item.size, item.letter


def _near(one: Object, other: Object) -> bool:
    return math.hypot(one.x - other.x, one.y - other.y) <= SAME_POSITION


def _match(objects: Sequence[Object], wanted: Sequence[Object], anywhere: Sequence[Object] = ()) -> tuple[list[Object], list[Object]]:
    """Match each wanted object with one of ``objects`` that looks the same and has the same position; returns the unmatched of both.

    Args:
        anywhere: wanted objects that may have any position.
    """
    left, missing = list(objects), []
    for item in wanted:
        fits = [o for o in left if _label(o) == _label(item) and (item in anywhere or _near(o, item))]
        if fits:
            left.remove(fits[0])
        else:
            missing.append(item)
    return left, missing


def judge(before: Scene, after: Scene, generated: Scene) -> Judgment:
    """Compare a generated scene with the true edit.

    An added object may have any position, as instructions do not say where. An object that should change its color and has a wrong one
    counts against ``done`` only, not against ``kept``.

    Args:
        before: the source scene.
        after: the scene after the true edit.
        generated: the scene read from the generated image.
    """
    # 1. The true edit: objects that it removes or changes (old look), adds or changes (new look), and keeps.
    removed, new = _match(before.objects, after.objects)
    kept, _ = _match(after.objects, new)
    added = [item for item in new if not any(_near(item, other) for other in removed)]

    # 2. The generated scene: first find the objects to keep, then the new ones among the others.
    others, lost = _match(generated.objects, kept)
    extra, missing = _match(others, new, added)
    not_removed = any(_label(o) == _label(item) and _near(o, item) for o in others for item in removed)

    # 3. Extra objects at the position of a removed one are a change done wrong. Elsewhere they were added without request; but an added
    #    object with a wrong look is missing and extra at once, and is not counted twice.
    elsewhere = [o for o in extra if not any(_near(o, item) for item in removed)]
    added_missing = sum(item in added for item in missing)
    background_changes = before.background != after.background
    background_right = generated.background == after.background
    return Judgment(
        done=not missing and not not_removed and (background_right or not background_changes),
        kept=not lost and len(elsewhere) <= added_missing and (background_right or background_changes),
    )


def changed_region(before: Image.Image, after: Image.Image) -> np.ndarray:
    """Pixels that the true edit changes, dilated by :data:`AROUND` pixels for antialiased edges: boolean (h, w)."""
    differs = np.abs(np.asarray(before, dtype=int) - np.asarray(after, dtype=int)).max(-1) > CHANGED
    return ndimage.binary_dilation(differs, iterations=AROUND)


def psnr_outside(image: Image.Image, generated: Image.Image, region: np.ndarray, most: float = 60.0) -> float:
    """PSNR of a generated image against the true edit over the RGB pixels outside a region, dB; higher is better.

    Args:
        image: the true edit.
        region: boolean (h, w).
        most: upper bound, for equal pixels, whose PSNR is infinite.

    Returns:
        The PSNR; NaN if the region covers the whole image.
    """
    error = np.square(np.asarray(image, dtype=float) - np.asarray(generated, dtype=float))[~region]
    if not error.size:
        return math.nan
    return min(most, 10 * math.log10(255**2 / max(error.mean(), 1e-9)))
