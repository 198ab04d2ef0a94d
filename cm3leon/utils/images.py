"""Conversions between uint8 and [-1, 1], and sheets of pictures with their captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

IMAGES_A_ROW = 8
MOST_LINES = 18


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 of any shape to float32 in [-1, 1]."""
    return pixels.float().div(127.5).sub(1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Floats in [-1, 1] of any shape to uint8, rounded; values outside are clipped."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def to_channels_first(pixels: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1] on ``device``."""
    return to_unit(pixels.to(device).permute(0, 3, 1, 2)).contiguous()


def to_channels_last(images: torch.Tensor) -> torch.Tensor:
    """Floats (B, 3, H, W) in [-1, 1] to uint8 (B, H, W, 3) on the CPU."""
    return to_uint8(images).permute(0, 2, 3, 1).cpu()


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Floats (B, 3, H, W) in [-1, 1] to RGB pictures."""
    return [Image.fromarray(array) for array in to_channels_last(images).numpy()]


def save_pairs(originals: np.ndarray, copies: np.ndarray, path: Path, scale: int = 2) -> None:
    """A sheet of uint8 images (N, H, W, 3): rows of originals, each with the row of copies below it."""
    rows = []
    for start in range(0, len(originals), IMAGES_A_ROW):
        for part in (originals[start : start + IMAGES_A_ROW], copies[start : start + IMAGES_A_ROW]):
            blank = np.full((IMAGES_A_ROW - len(part), *part.shape[1:]), 255, dtype=np.uint8)
            rows.append(np.concatenate([*part, *blank], axis=1))
    sheet = Image.fromarray(np.concatenate(rows, axis=0))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(path)


def save_captioned(images: Sequence[Image.Image], captions: Sequence[str], path: Path, columns: int = 6, cell: int = 160) -> None:
    """A sheet of images, each with its caption below; what is behind :data:`MOST_LINES` lines is left out."""
    font = ImageFont.load_default(12)
    line = 14
    lines = [wrap(caption, cell, font)[:MOST_LINES] for caption in captions]
    heights = [cell + max(len(found) for found in lines[start : start + columns]) * line + 14 for start in range(0, len(images), columns)]
    sheet = Image.new("RGB", (columns * (cell + 8) + 8, sum(heights) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, own) in enumerate(zip(images, lines, strict=True)):
        row, column = divmod(number, columns)
        x, y = 8 + column * (cell + 8), 8 + sum(heights[:row])
        sheet.paste(image.convert("RGB").resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        draw.rectangle((x - 1, y - 1, x + cell, y + cell), outline=(200, 200, 200))
        for index, text in enumerate(own):
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
