"""Image files of every kind, whole and damaged, made here: for tests and for ``benchmarks/hostile.py``."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, features

from cm3leon.data.images import FORMATS, PNG_SIGNATURE

MODES = ["1", "CMYK", "F", "HSV", "I", "I;16", "I;16B", "L", "LA", "La", "LAB", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr"]
"""Pillow's."""
SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
"""The primaries of sRGB, adapted to D50."""
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Of a PNG's color type: its channels, and the bits of each that it may have (PNG specification, section 11.2.1)."""
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row, and steps, of the passes of an interlaced PNG (section 8.1)."""
Chunks = list[tuple[bytes, bytes]]
"""Name and content of each."""


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Image.Image:
    """Pixels that have nothing to do with one another."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8))


def squares(number: int, side: int = 40) -> Image.Image:
    """A picture of large squares, unlike those of other numbers."""
    return noise(4, 4, seed=number).resize((side, side), Image.Resampling.NEAREST)


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """An image in any of :data:`MODES`, by the ways that Pillow has."""
    if mode.startswith("I;16"):
        values = np.asarray(image.convert("L")).astype(np.uint16) * 257
        return Image.fromarray(values.astype(">u2" if mode.endswith("B") else "<u2"))
    if mode in ("La", "RGBa"):
        return image.convert(mode.upper()).convert(mode)
    if mode in ("HSV", "LAB", "YCbCr", "CMYK", "RGBX"):
        return image.convert("RGB").convert(mode)
    if mode == "PA":
        return image.convert("P").convert("PA")
    return image.convert("L").convert(mode) if mode in ("F", "I", "LA") else image.convert(mode)


# --- PNG, chunk by chunk ---------------------------------------------------------------------------------------------


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk with its length and checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_chunks(color: int, depth: int, interlaced: bool, side: int = 40, seed: int = 0) -> Chunks:
    """A PNG of a color type and bit depth, in which pixels are random."""
    colors = min(2**depth, 256) if color == 3 else 2**depth
    pixels = np.random.default_rng(seed).integers(0, colors, (side, side, CHANNELS[color]))
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    lines = b"".join(b"\0" + _packed(row, depth) for x, y, across, down in passes for row in pixels[y::down, x::across])
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, color, 0, 0, int(interlaced)))]
    if color == 3:
        chunks.append((b"PLTE", np.random.default_rng(seed + 1).bytes(3 * colors)))
    return [*chunks, (b"tEXt", b"Comment\0a picture"), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]


def _packed(row: np.ndarray, depth: int) -> bytes:
    if depth >= 8:
        return row.astype(">u2" if depth == 16 else np.uint8).tobytes()
    bits = (row.reshape(-1, 1) >> np.arange(depth - 1, -1, -1)) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def png_of(chunks: Chunks) -> bytes:
    """The file."""
    return PNG_SIGNATURE + b"".join(chunk(*part) for part in chunks)


def _damaged_pngs(chunks: Chunks, rng: np.random.Generator) -> Iterator[bytes]:
    """The PNG with each chunk damaged, missing, or twice; in another order; and with other lengths and sizes."""
    whole = png_of(chunks)
    for number, (name, content) in enumerate(chunks):
        position = whole.index(name)
        wrong = bytearray(whole)
        wrong[position + 4 + int(rng.integers(max(1, len(content))))] ^= 1 << int(rng.integers(8))
        yield bytes(wrong)
        yield png_of(chunks[:number] + chunks[number + 1 :])
        yield png_of(chunks[: number + 1] + chunks[number:])
        yield whole[: position - 4] + struct.pack(">I", 0x7FFF_FFFF) + whole[position:]
    yield png_of([chunks[0], *reversed(chunks[1:])])
    yield png_of([(name, b"" if name == b"IDAT" else content) for name, content in chunks])
    yield whole + b"what does not belong here"
    for width, height in ((0, 40), (2**31 - 1, 1), (60_000, 60_000), (41, 43)):
        header = struct.pack(">II", width, height) + chunks[0][1][8:]
        yield png_of([(b"IHDR", header), *chunks[1:]])


# --- ICC -------------------------------------------------------------------------------------------------------------


def icc_profile(red: tuple[float, float, float], green: tuple[float, float, float], blue: tuple[float, float, float]) -> bytes:
    """An ICC profile (version 2) of a display with these primaries (XYZ, D50) and a linear response."""
    fixed = [b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in color) for color in (red, green, blue)]
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    linear = b"curv\0\0\0\0" + struct.pack(">I", 0)
    names = [b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt", b"rTRC", b"gTRC", b"bTRC"]
    contents = [*fixed, white, linear, linear, linear]
    offset, table, data = 128 + 4 + 12 * len(names), b"", b""
    for name, content in zip(names, contents, strict=True):
        table += name + struct.pack(">II", offset + len(data), len(content))
        data += content
    size = offset + len(data)
    header = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02400000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp" + bytes(28)
    header += struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(names)) + table + data


def gray_profile() -> bytes:
    """An ICC profile (version 2) of a gray display with a linear response."""
    white, linear = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061), b"curv\0\0\0\0" + struct.pack(">I", 0)
    start = 128 + 4 + 12 * 2
    table = b"wtpt" + struct.pack(">II", start, len(white)) + b"kTRC" + struct.pack(">II", start + len(white), len(linear))
    size = start + len(white) + len(linear)
    header = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02400000, b"mntr", b"GRAY", b"XYZ ") + bytes(12) + b"acsp" + bytes(28)
    header += struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", 2) + table + white + linear


# --- hostile files ---------------------------------------------------------------------------------------------------


def hostile_files(flips: int = 40, seed: int = 0) -> Iterator[bytes]:
    """Files that are damaged, rare, or made to cost much, and among them some that are neither.

    Args:
        flips: files with flipped bits of each format; what there are more of than other files grows with it.
    """
    rng = np.random.default_rng(seed)
    yield from (
        b"",
        b"\0" * 1000,
        b"GIF89a",
        PNG_SIGNATURE,
        b"\xff\xd8\xff",
        b"%PDF-1.4",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"<svg/>",
        rng.bytes(5000),
    )
    yield from _truncated()
    yield from _flipped(flips, rng)
    yield from _modes_and_formats()
    for color, depths in DEPTHS.items():
        for depth in depths:
            for interlaced in (False, True):
                chunks = png_chunks(color, depth, interlaced, seed=int(rng.integers(1 << 30)))
                yield png_of(chunks)
                yield from _damaged_pngs(chunks, rng)
    yield from _costly()
    yield from _with_odd_metadata(rng)


def _formats() -> list[str]:
    """The formats that are read and that this Pillow can write."""
    optional = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}
    return [kind for kind in FORMATS if kind not in optional or features.check(optional[kind])]


def _truncated() -> Iterator[bytes]:
    """Each format, whole and cut at every tenth and just before its end."""
    for number, kind in enumerate(_formats()):
        whole = encode(squares(number, 96), kind)
        yield whole
        yield from (whole[: len(whole) * tenth // 10] for tenth in range(1, 10))
        yield whole[:-1]


def _flipped(flips: int, rng: np.random.Generator) -> Iterator[bytes]:
    """Each format with one to four flipped bits."""
    for number, kind in enumerate(_formats()):
        whole = encode(squares(100 + number, 64), kind)
        for _ in range(flips):
            damaged = bytearray(whole)
            for position in rng.integers(4, len(whole), size=int(rng.integers(1, 5))):
                damaged[position] ^= 1 << int(rng.integers(8))
            yield bytes(damaged)


def _modes_and_formats() -> Iterator[bytes]:
    """Every mode in every format, also those that are not read, as far as Pillow writes it."""
    Image.init()
    for number, mode in enumerate(MODES):
        image = in_mode(squares(200 + number), mode)
        for kind in sorted(Image.SAVE):
            try:
                yield encode(image, kind)
            except (OSError, ValueError, KeyError, AttributeError, TypeError, SystemError):
                continue  # the format has no such mode


def _costly() -> Iterator[bytes]:
    """More pixels, frames, scans or text than a file of its size should have."""
    for kind in ("PNG", "TIFF", "GIF"):
        yield encode(Image.new("1", (12_000, 12_000)), kind, **({"compression": "tiff_adobe_deflate"} if kind == "TIFF" else {}))
    for size in ((1, 1), (1, 200_000), (200_000, 1), (6_000, 6_000)):
        yield encode(Image.new("L", size, 9), "PNG")
    frames = [squares(300 + number, 64) for number in range(50)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        if kind in _formats():
            yield encode(frames[0], kind, save_all=True, append_images=frames[1:])
    progressive = encode(noise(256, 256), "JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    yield progressive[:-2] + 300 * scan + progressive[-2:]
    text = zlib.compress(b"\0" * 50_000_000)
    chunks = png_chunks(2, 8, interlaced=False)
    yield png_of([chunks[0], (b"zTXt", b"Comment\0\0" + text), *chunks[1:]])
    yield png_of([chunks[0], (b"iCCP", b"profile\0\0" + text), *chunks[1:]])


def _with_odd_metadata(rng: np.random.Generator) -> Iterator[bytes]:
    """EXIF orientations that there are and that there are not, and EXIF data and color profiles that are none."""
    for orientation in range(12):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
            yield encode(squares(400 + orientation), kind, exif=exif)
    profiles = (icc_profile(*SRGB), icc_profile(*reversed(SRGB)), icc_profile(*SRGB)[:200], b"no profile", rng.bytes(1000))
    for number, profile in enumerate(profiles):
        for mode, kind in (("RGB", "PNG"), ("L", "PNG"), ("CMYK", "JPEG"), ("RGB", "WEBP"), ("RGB", "TIFF")):
            yield encode(in_mode(squares(500 + number), mode), kind, icc_profile=profile)
    for content in (b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\1\0" + rng.bytes(40), rng.bytes(300)):
        for kind in ("JPEG", "PNG", "WEBP"):
            yield encode(squares(600), kind, exif=content)
