"""Encoded image files to RGB: a decoder that limits the size and detects damage, and resizing to a square."""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile, UnidentifiedImageError

from cm3leon.utils.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Formats that are decoded; others (EPS, PDF, ICNS ...) start other programs or are not raster images, and are ``unreadable``."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif", ".jp2", ".heic", ".heif")
"""How files of these formats, and of HEIC, are usually called."""
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
HEIF_BRANDS = (b"mif1", b"msf1")
"""Major brands of HEIF files (ISO/IEC 23008-12): images in HEVC, and in any codec, of which AVIF is one."""
MAX_PIXELS = 50_000_000
"""Most pixels of an image that ``ingest`` decodes; ``validate`` rejects images by its own limit."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
DEEP_RANGES = (1.0, 255.0, 65_535.0)
"""Largest values of gray images of floats or 32-bit integers: black is 0, and white the smallest of these that no pixel exceeds."""

TWELVE_BITS = 4096
"""Cameras of 10 or 12 bits write files of 16: one in which all gray values are below this may be too dark."""

TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation -> what makes an image upright."""
ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
"""Entries of ``info`` in which Pillow finds an orientation."""
LANCZOS_SUPPORT = 3
"""Pixels on each side, of the smaller scale, on which a resized pixel depends."""

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, of which :func:`decode` and its callers would not know


class ImageError(UserError):
    """An image file cannot be used. ``reason`` is a code (``unreadable``, ``decompression_bomb``), ``detail`` says why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def to_rgb(image: Image.Image) -> Image.Image:
    """sRGB pixels of any mode: EXIF orientation and color profile applied, transparency composited on white, deep gray scaled to 8 bits.

    ``info["note"]`` of the result says how values were scaled, if that had to be guessed.

    Raises:
        ValueError: if gray values are negative, not finite, or above 65,535.
    """
    if image.mode == "RGB" and not image.getexif() and not image.info.keys() & {"transparency", "icc_profile"}:
        return image
    note = None
    image = _in_srgb(_upright(image))
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image, note = _eight_bit_gray(image)
    if image.mode == "La":
        image = image.convert("LA")  # Pillow converts it to nothing else
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        white.alpha_composite(image.convert("RGBA"))
        image = white
    image = image.convert("RGB")
    for applied in ("icc_profile", "transparency", *ORIENTATION):
        image.info.pop(applied, None)
    if note:
        image.info["note"] = note
    return image


def _upright(image: Image.Image) -> Image.Image:
    """An image as it is shown; of EXIF only the orientation is read, as other tags may be damaged."""
    turned = TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turned is None else image.transpose(turned)


def _in_srgb(image: Image.Image) -> Image.Image:
    """An image with the colors that its profile stands for; as it is if it has none, or one that does not fit its mode."""
    embedded = image.info.get("icc_profile")
    if not embedded or image.mode.startswith("I") or image.mode == "F":
        return image
    if image.mode in ("RGB", "L") and "transparency" in image.info:  # the color that stands for it would be another one
        image = image.convert("RGBA" if image.mode == "RGB" else "LA")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(embedded))
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        colors = image.getchannel("L") if image.mode == "LA" else image
        found = ImageCms.profileToProfile(colors, profile, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    if found is None:
        return image
    if image.mode == "LA":
        found.putalpha(image.getchannel("A"))
    found.info.pop("icc_profile", None)
    return found


def _eight_bit_gray(image: Image.Image) -> tuple[Image.Image, str | None]:
    """An image of mode ``L``, or ``LA`` if one gray stands for transparency, and a note if the range of its values is a guess."""
    values = np.asarray(image, dtype=np.float64)
    white, note = 65_535.0, None
    if not image.mode.startswith("I;16") and image.format not in ("PNG", "PPM"):  # those have 16 bits by definition
        low, high = float(values.min()), float(values.max())
        ranges = DEEP_RANGES if image.mode == "F" else DEEP_RANGES[1:]
        if not (np.isfinite(values).all() and low >= 0 and high <= ranges[-1]):
            raise ValueError(f"gray values from {low:g} to {high:g}: images of mode {image.mode} are read from 0 to {ranges[-1]:,.0f}")
        white = next(most for most in ranges if high <= most)
        note = f"gray values from {low:g} to {high:g} were scaled from 0 to {white:,.0f}"
    elif (high := float(values.max())) < TWELVE_BITS:
        note = f"gray values reach {high:g} of {white:,.0f}: nearly black, unless the camera's bits are scaled to 16"
    scaled = values.astype(np.int64) >> 8 if white == 65_535 else np.rint(values * (255 / white))
    gray = Image.fromarray(scaled.astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        gray.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return gray, note


def decode(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """Decode an image file to RGB (see :func:`to_rgb`); of an animation, the first frame.

    The size in the header is compared with ``max_pixels`` before any pixel is decoded.

    Raises:
        ImageError: ``decompression_bomb`` for an image that is too large, ``unreadable`` for one that is damaged or not decodable.
    """
    try:
        if data.startswith(PNG_SIGNATURE):
            data = _checked_png(data)
        image = _opened(data)
        width, height = image.size
        if max_pixels is not None and width * height > max_pixels:
            raise ImageError("decompression_bomb", f"{width}x{height} pixels, {max_pixels} allowed")
        # Of 16-bit colors Pillow keeps the upper eight bits, but not of the transparent one.
        deep_colors = any("16B" in str(tile[3]) for tile in image.tile)
        image.load()
        clear = image.info.get("transparency")
        if deep_colors and isinstance(clear, tuple):
            image.info["transparency"] = tuple(value >> 8 for value in clear)
        return to_rgb(image)
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError("unreadable", f"{len(data)} bytes that are no {', '.join(FORMATS)} file") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ... on damaged files
        raise ImageError("unreadable", f"{type(error).__name__}: {error}") from None


def _opened(data: bytes) -> ImageFile.ImageFile:
    """An image of which the header was read.

    Raises:
        ImageError: ``unreadable`` for a HEIC file without the library that decodes it.
    """
    if not is_heic(data):
        return Image.open(io.BytesIO(data), formats=FORMATS)
    try:
        import pillow_heif
    except ImportError:
        raise ImageError("unreadable", "a HEIC file; to read these: pip install 'cm3leon[heic]'") from None
    pillow_heif.register_heif_opener()
    return Image.open(io.BytesIO(data), formats=("HEIF",))


def is_heic(data: bytes) -> bool:
    """True for a HEIC or another HEIF file that is no AVIF, as the brands in its first box say."""
    if data[4:8] != b"ftyp":
        return False
    brand, compatible = data[8:12], data[16 : min(int.from_bytes(data[:4]), 256)]
    return brand in HEIC_BRANDS or (brand in HEIF_BRANDS and b"avif" not in compatible and b"avis" not in compatible)


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height of the decoded image, pixels, of which no pixel is decoded.

    Raises:
        ImageError: ``unreadable`` if the header cannot be read.
    """
    try:
        image = _opened(data)
        width, height = image.size
        turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # a TIFF has its turned size
    except ImageError:
        raise
    except Exception as error:  # as in :func:`decode`
        raise ImageError("unreadable", f"{type(error).__name__}: {error}") from None
    return (height, width) if turned else (width, height)


def _png_chunks(data: bytes) -> Iterator[tuple[int, bytes, bool]]:
    """Offset, name and whether the checksum is right, of each chunk to the end of the image (PNG specification, section 5.3)."""
    position = len(PNG_SIGNATURE)
    while position + 12 <= len(data):
        size, name = struct.unpack_from(">I4s", data, position)
        end = position + 12 + size
        if end > len(data):
            return
        yield position, name, zlib.crc32(memoryview(data)[position + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])
        position = end
        if name == b"IEND":
            return


def _checked_png(data: bytes) -> bytes:
    """A PNG without the damaged chunks of which its pixels do not depend. Pillow checks no pixels' checksums, and reads a truncated file.

    Raises:
        ImageError: ``unreadable`` if it is truncated, or a chunk that its pixels need is damaged.
    """
    last, damaged = b"", []
    for position, name, intact in _png_chunks(data):
        last = name
        if not intact and (name[:1].isupper() or name == b"tRNS"):  # capital: critical
            raise ImageError("unreadable", f"damaged PNG: wrong checksum of chunk {name.decode('latin-1')} at byte {position}")
        if not intact:
            damaged.append(position)
    if last != b"IEND":
        raise ImageError("unreadable", f"truncated PNG: {len(data)} bytes without an end marker")
    for position in reversed(damaged):
        (size,) = struct.unpack_from(">I", data, position)
        data = data[:position] + data[position + 12 + size :]
    return data


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
    across, down = max(size, round(width * scale)), max(size, round(height * scale))
    # Only what the square and the filter's support need is resized: a picture much longer than wide is never enlarged whole.
    margin = math.ceil(LANCZOS_SUPPORT * max(1.0, scale))
    left, top = (across - size) // 2, (down - size) // 2
    x0, x1 = max(0, left - margin), min(across, left + size + margin)
    y0, y1 = max(0, top - margin), min(down, top + size + margin)
    box = (x0 * width / across, y0 * height / down, x1 * width / across, y1 * height / down)
    resized = image.resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS, box=box)
    return resized.crop((left - x0, top - y0, left - x0 + size, top - y0 + size))
