"""Sheets of images with their captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

IMAGES_PER_ROW = 8
MAX_LINES = 18
"""Longer captions are cut."""


def save_pairs(originals: np.ndarray, copies: np.ndarray, path: Path, scale: int = 2) -> None:
    """Save a sheet of uint8 images (N, H, W, 3): rows of originals, each above the row of its copies."""
    rows = []
    for start in range(0, len(originals), IMAGES_PER_ROW):
        for images in (originals[start : start + IMAGES_PER_ROW], copies[start : start + IMAGES_PER_ROW]):
            blank = np.full((IMAGES_PER_ROW - len(images), *images.shape[1:]), 255, dtype=np.uint8)
            rows.append(np.concatenate([*images, *blank], axis=1))
    sheet = Image.fromarray(np.concatenate(rows, axis=0))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(path)


def save_captioned(images: Sequence[Image.Image], captions: Sequence[str], path: Path, columns: int | None = None, cell: int = 160) -> None:
    """Save a sheet of images, each above its caption, of which at most :data:`MAX_LINES` lines are shown.

    Args:
        columns: None makes the sheet about square, the shape in which MLflow shows images.
    """
    columns = columns or max(1, round(math.sqrt(1.2 * len(images))))  # a caption makes a cell about 1.2 times as high as wide
    font = ImageFont.load_default(12)
    line = 14
    lines = [wrap(caption, cell, font)[:MAX_LINES] for caption in captions]
    # A row is as high as its longest caption needs.
    most_lines = [max(map(len, lines[start : start + columns])) for start in range(0, len(images), columns)]
    heights = [cell + most * line + 14 for most in most_lines]
    sheet = Image.new("RGB", (columns * (cell + 8) + 8, sum(heights) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, caption_lines) in enumerate(zip(images, lines, strict=True)):
        row, column = divmod(number, columns)
        x, y = 8 + column * (cell + 8), 8 + sum(heights[:row])
        sheet.paste(image.convert("RGB").resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        draw.rectangle((x - 1, y - 1, x + cell, y + cell), outline=(200, 200, 200))
        for index, text in enumerate(caption_lines):
            draw.text((x, y + cell + 2 + index * line), text, fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Break ``text`` into lines of at most ``width`` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
