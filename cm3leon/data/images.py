"""Encoded image files to RGB: a decoder that limits the size and detects truncated files, and resizing to a square."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cm3leon.utils.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are decoded; others (EPS, PDF, ICNS ...) start other programs or are not raster images, and are ``unreadable``."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_END = b"IEND\xaeB`\x82"


class ImageError(UserError):
    """An image file cannot be used. ``reason`` is a code (``unreadable``, ``decompression_bomb``), ``detail`` says why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB pixels of any mode: EXIF orientation applied, transparency composited on white, 16-bit gray scaled to 8 bits."""
    if image.mode == "RGB" and not image.getexif() and "transparency" not in image.info:
        return image
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.clip(np.asarray(image, dtype=np.int64), 0, 65_535) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def decode(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """Decode an image file to RGB (see :func:`to_rgb`); of an animation, the first frame.

    The size in the header is compared with ``max_pixels`` before any pixel is decoded.

    Raises:
        ImageError: ``decompression_bomb`` for an image that is too large, ``unreadable`` for one that is truncated or not decodable.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if max_pixels is not None and width * height > max_pixels:
            raise ImageError("decompression_bomb", f"{width}x{height} pixels, {max_pixels} allowed")
        # Pillow decodes a PNG whose last chunks are missing without an error.
        if data.startswith(PNG_SIGNATURE) and data.rfind(PNG_END) < 0:
            raise ImageError("unreadable", f"truncated PNG: {len(data)} bytes without an end marker")
        image.load()
        return to_rgb(image)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("decompression_bomb", str(error)) from None
    except UnidentifiedImageError:
        raise ImageError("unreadable", f"{len(data)} bytes that are no {', '.join(FORMATS)} file") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ... on damaged files
        raise ImageError("unreadable", f"{type(error).__name__}: {error}") from None


def encode(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3), as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size`` pixels (Lanczos), then crop the center to ``size`` x ``size``; RGB."""
    image = to_rgb(image)
    width, height = image.size
    if width == height == size:
        return image
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
