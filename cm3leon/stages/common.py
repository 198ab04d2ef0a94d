"""What several stages share: the device, sheets of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 8
CAPTION_LINES = 6


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def save_pairs(originals: np.ndarray, copies: np.ndarray, path: Path, scale: int = 2) -> None:
    """A sheet of uint8 images (N, H, W, 3): rows of originals, each with the row of copies below it."""
    rows = []
    for start in range(0, len(originals), COLUMNS):
        for part in (originals[start : start + COLUMNS], copies[start : start + COLUMNS]):
            blank = np.full((COLUMNS - len(part), *part.shape[1:]), 255, dtype=np.uint8)
            rows.append(np.concatenate([*part, *blank], axis=1))
    sheet = Image.fromarray(np.concatenate(rows, axis=0))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(path)


def save_captioned(images: Sequence[Image.Image], captions: Sequence[str], path: Path, columns: int = 6, cell: int = 160) -> None:
    """A sheet of images, each with its caption below."""
    font = ImageFont.load_default(12)
    line = 14
    height = cell + CAPTION_LINES * line + 8
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (cell + 8) + 8, rows * height + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = 8 + (number % columns) * (cell + 8), 8 + (number // columns) * height
        sheet.paste(image.convert("RGB").resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        draw.rectangle((x - 1, y - 1, x + cell, y + cell), outline=(200, 200, 200))
        for index, text in enumerate(wrap(caption, cell, font)[:CAPTION_LINES]):
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
