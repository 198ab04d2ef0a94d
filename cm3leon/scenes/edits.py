"""Was the asked edit made, and did the rest stay? Of scenes, object by object; of any image, outside of what the true edit changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from cm3leon.scenes.scene import Object, Scene

PLACE = 0.1
"""Two centers nearer than this are one place, share of the side."""
CHANGED = 12
"""A pixel whose channels differ by more than this, of 255, between an image and its true edit belongs to what the edit changes."""
AROUND = 2
"""Pixels around what the edit changes that belong to it too."""


@dataclass(frozen=True)
class Judgment:
    """``done``: the asked change is there. ``kept``: what it does not concern is as before, and nothing came in addition."""

    done: bool
    kept: bool


def _label(item: Object) -> tuple[str | None, ...]:
    return item.shape, item.color, item.size, item.letter


def _near(one: Object, other: Object) -> bool:
    return math.hypot(one.x - other.x, one.y - other.y) <= PLACE


def _match(objects: Sequence[Object], wanted: Sequence[Object], anywhere: Sequence[Object] = ()) -> tuple[list[Object], list[Object]]:
    """Take one that looks like each of ``wanted``, at its place unless ``anywhere`` names it, from ``objects``; what is left of both."""
    left, missing = list(objects), []
    for item in wanted:
        fits = [o for o in left if _label(o) == _label(item) and (item in anywhere or _near(o, item))]
        if fits:
            left.remove(fits[0])
        else:
            missing.append(item)
    return left, missing


def judge(before: Scene, after: Scene, drawn: Scene) -> Judgment:
    """Compare what was drawn with what an edit makes of a scene. What is added may stand anywhere: instructions do not say where.

    A changed object in a wrong color is a change not made, and leaves the rest as it was.
    """
    gone, come = _match(before.objects, after.objects)
    stays, _ = _match(after.objects, come)
    added = [item for item in come if not any(_near(item, other) for other in gone)]
    rest, lost = _match(drawn.objects, stays)
    extra, missing = _match(rest, come, added)
    undone = any(_label(o) == _label(item) and _near(o, item) for o in rest for item in gone)
    elsewhere = [o for o in extra if not any(_near(o, item) for item in gone)]
    ground_changes, ground_right = before.background != after.background, drawn.background == after.background
    return Judgment(
        done=not missing and not undone and (ground_right or not ground_changes),
        kept=not lost and len(elsewhere) <= sum(item in added for item in missing) and (ground_right or ground_changes),
    )


def changed_region(before: Image.Image, after: Image.Image) -> np.ndarray:
    """Boolean (h, w): what a true edit changes of an image, and a little around it."""
    differs = np.abs(np.asarray(before, dtype=int) - np.asarray(after, dtype=int)).max(-1) > CHANGED
    return ndimage.binary_dilation(differs, iterations=AROUND)


def psnr_outside(image: Image.Image, drawn: Image.Image, region: np.ndarray, most: float = 60.0) -> float:
    """PSNR of RGB pixels outside a region, dB, at most ``most``; of what covers everything, NaN."""
    error = np.square(np.asarray(image, dtype=float) - np.asarray(drawn, dtype=float))[~region]
    if not error.size:
        return math.nan
    return min(most, 10 * math.log10(255**2 / max(error.mean(), 1e-9)))
