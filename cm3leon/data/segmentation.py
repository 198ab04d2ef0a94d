"""Segmentation maps from panoptic annotations (cocodataset.org/#format-data): the color of a pixel says its category.

In a panoptic PNG the number of a pixel's segment is R + 256 G + 65536 B, and 0 is no segment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from cm3leon.data.cells import RowProblem
from cm3leon.data.images import MAX_PIXELS, ImageError, decode, encode

SEGMENTATION_MAP = "segmentation map"
"""The kind of condition, one of ``cm3leon.sequence.tasks.CONDITIONS``."""
DARKEST = 32
"""Least value of a category's color channels: black is what has no category."""


def category_color(name: str) -> tuple[int, int, int]:
    """RGB of a category, which depends on its name alone: equal in all collections and runs."""
    red, green, blue = (DARKEST + value % (256 - DARKEST) for value in hashlib.sha256(name.encode()).digest()[:3])
    return red, green, blue


def segmentation_map(panoptic: bytes, categories: Mapping[int, str]) -> bytes:
    """A panoptic PNG with the color of its category in each pixel, as a PNG.

    Args:
        categories: by the number of the segment.

    Raises:
        RowProblem: ``unreadable_condition`` if the file is damaged, ``malformed_row`` if it has a segment without a category.
    """
    try:
        pixels = np.asarray(decode(panoptic, MAX_PIXELS)).astype(np.int64)
    except ImageError as error:
        raise RowProblem("unreadable_condition", f"{SEGMENTATION_MAP}: {error}") from None
    numbers, places = np.unique(pixels @ np.array([1, 256, 65_536]), return_inverse=True)
    unknown = [int(number) for number in numbers if number and number not in categories]
    if unknown:
        raise RowProblem("malformed_row", f"{SEGMENTATION_MAP}: segments_info lists no segment {unknown[0]}")
    colors = [category_color(categories[int(number)]) if number else (0, 0, 0) for number in numbers]
    return encode(np.array(colors, dtype=np.uint8)[places.reshape(pixels.shape[:2])])
