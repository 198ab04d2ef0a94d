"""The decoder accepts any mode and refuses damaged, truncated and huge files."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
from images_support import CHANNELS, DEPTHS, MODES, SRGB, encode, gray_profile, icc_profile, in_mode, noise, png_chunks, png_of
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from cm3leon.data.images import ImageError, decode, fit_square, is_heic, size_of, to_rgb


def test_transparency_is_composited_on_white() -> None:
    rgba = np.array(noise(7, 5, 4))
    alpha = rgba[..., 3:].astype(float) / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    found = np.asarray(decode(encode(Image.fromarray(rgba))), dtype=float)
    assert np.abs(found - expected).max() <= 1
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([200, 10, 10] * 256)
    assert decode(encode(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied() -> None:
    image = noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    rotated = decode(encode(image, exif=exif))
    assert np.array_equal(np.asarray(rotated), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_applied_once_whatever_other_tags_are_damaged(orientation: int) -> None:
    image = noise(8, 4)
    block = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2)
    block += struct.pack("<HHII", 0x0112, 3, 1, orientation) + struct.pack("<HHI4s", 0x011A, 2, 4, b"abc\0")  # XResolution as text
    turned = decode(encode(image, exif=block + bytes(4)))
    expected = Image.open(io.BytesIO(encode(image, exif=block[:14] + struct.pack("<H", 1) + block[16:28] + bytes(4))))
    assert np.array_equal(np.asarray(turned), np.asarray(ImageOps.exif_transpose(expected)))
    assert to_rgb(turned) is turned


def test_sixteen_bit_gray_keeps_its_range() -> None:
    values = np.array([[0, 128 << 8, 65_535]], dtype=np.uint16)
    assert [pixel[0] for pixel in np.asarray(decode(encode(Image.fromarray(values))))[0]] == [0, 128, 255]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_never_decodes(kind: str) -> None:
    data = encode(noise(40, 30), kind)
    decode(data)
    for share in (0.0, 0.1, 0.5, 0.9, 0.97):
        with pytest.raises(ImageError) as caught:
            decode(data[: int(len(data) * share)])
        assert caught.value.reason == "unreadable"


def test_a_png_without_its_end_marker_is_truncated() -> None:
    with pytest.raises(ImageError, match="end marker"):
        decode(encode(noise(8, 8))[:-12])


def test_a_large_image_is_refused_before_it_is_decoded() -> None:
    data = bytearray(encode(noise(8, 8)))
    data[16:24] = (20_000).to_bytes(4, "big") * 2  # the header says 400 million pixels; there is no such data
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(ImageError) as caught:
        decode(bytes(data), max_pixels=1_000_000)
    assert caught.value.reason == "decompression_bomb"
    with pytest.raises(ImageError, match="unreadable"):  # Pillow's own limit is lower
        decode(bytes(data), max_pixels=400_000_000)
    assert decode(encode(noise(10, 10)), max_pixels=100).size == (10, 10)
    with pytest.raises(ImageError, match="11x10"):
        decode(encode(noise(11, 10)), max_pixels=100)


def test_formats_that_start_other_programs_are_refused() -> None:
    with pytest.raises(ImageError, match="unreadable"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


@pytest.mark.parametrize(("width", "height"), [(64, 64), (100, 40), (40, 100), (3, 500), (17, 16)])
def test_fit_square_keeps_the_center(width: int, height: int) -> None:
    position = np.zeros((height, width, 3), dtype=np.uint8)
    position[..., 0] = np.linspace(0, 255, width)[None]
    position[..., 1] = np.linspace(0, 255, height)[:, None]
    fitted = np.asarray(fit_square(Image.fromarray(position), 16), dtype=float)
    assert fitted.shape == (16, 16, 3)
    side = min(width, height)
    for channel, length in ((0, width), (1, height)):
        assert abs(fitted[..., channel].mean() - 127.5) < 12
        step = np.ptp(fitted[..., channel])
        assert abs(step - 255 * side / length) < 40  # the longer side is cropped


def test_fit_square_is_idempotent_and_takes_any_mode() -> None:
    image = fit_square(noise(50, 70, 4), 32)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(fit_square(image, 32)), np.asarray(image))
    assert fit_square(Image.new("L", (9, 9), 7), 4).getpixel((0, 0)) == (7, 7, 7)
    assert to_rgb(Image.new("CMYK", (2, 2))).mode == "RGB"


@pytest.mark.parametrize(("width", "height", "size"), [(64, 148, 71), (200, 30, 16), (31, 300, 8), (5, 60, 24), (90, 80, 90)])
def test_fit_square_is_what_resizing_the_whole_image_gives(width: int, height: int, size: int) -> None:
    smooth = np.asarray(noise(4, 4).resize((width, height), Image.Resampling.BICUBIC))
    scale = size / min(width, height)
    across, down = max(size, round(width * scale)), max(size, round(height * scale))
    left, top = (across - size) // 2, (down - size) // 2
    whole = Image.fromarray(smooth).resize((across, down), Image.Resampling.LANCZOS).crop((left, top, left + size, top + size))
    found = np.asarray(fit_square(Image.fromarray(smooth), size), dtype=int)
    assert np.abs(found - np.asarray(whole)).max() <= 2


@pytest.mark.parametrize("shape", [(1, 3_000_000), (3_000_000, 1)])
def test_a_picture_much_longer_than_wide_is_not_enlarged_whole(shape: tuple[int, int]) -> None:
    """It would take 590 GB; Pillow refuses that much."""
    assert fit_square(Image.new("RGB", shape, (1, 2, 3)), 256).getpixel((200, 50)) == (1, 2, 3)


def gray(values: list[float], dtype: str, **options: object) -> Image.Image:
    return decode(encode(Image.fromarray(np.array([values], dtype=dtype)), "TIFF", **options))


@pytest.mark.parametrize(
    ("values", "dtype", "expected", "white"),
    [
        ([0, 0.5, 0.98], "float32", [0, 128, 250], "1"),
        ([0, 128, 250], "float32", [0, 128, 250], "255"),
        ([0, 32_768, 65_535], "float32", [0, 128, 255], "65,535"),
        ([0, 1, 250], "int32", [0, 1, 250], "255"),
        ([0, 32_768, 65_535], "int32", [0, 128, 255], "65,535"),
    ],
)
def test_deep_gray_is_scaled_by_its_range_which_is_noted(values: list[float], dtype: str, expected: list[int], white: str) -> None:
    image = gray(values, dtype)
    assert [pixel[0] for pixel in np.asarray(image)[0]] == expected
    assert image.info["note"] == f"gray values from 0 to {max(values):g} were scaled from 0 to {white}"


@pytest.mark.parametrize("file_format", ["TIFF", "PNG"])
def test_a_picture_of_12_bits_in_a_file_of_16_is_noted(file_format: str) -> None:
    dark, bright = (decode(encode(Image.fromarray(np.array([[0, most]], dtype=np.uint16)), file_format)) for most in (4095, 4096))
    assert (dark.getpixel((1, 0)), bright.getpixel((1, 0))) == ((15, 15, 15), (16, 16, 16))
    assert "gray values reach 4095 of 65,535: nearly black" in dark.info["note"] and "note" not in bright.info


@pytest.mark.parametrize(
    ("values", "dtype"), [([0, -1], "float32"), ([0, 1e6], "int32"), ([0, np.nan], "float32"), ([0, np.inf], "float32")]
)
def test_deep_gray_of_an_unknown_range_is_unreadable(values: list[float], dtype: str) -> None:
    with pytest.raises(ImageError, match=r"unreadable: ValueError: gray values from .* are read from 0 to 65,535"):
        gray(values, dtype)


def test_sixteen_bits_and_a_transparent_color_are_kept() -> None:
    """A PNG's transparent gray or color has as many bits as its pixels."""
    clear = Image.fromarray(np.array([[0, 0x1234, 0x1235]], dtype=np.uint16))
    assert [pixel[0] for pixel in np.asarray(decode(encode(clear, transparency=0x1234)))[0]] == [0, 255, 0x12]
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" + struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0, 0, 0))
    clear_color = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)
    image = decode(png_of([(b"IHDR", header), (b"tRNS", clear_color), (b"IDAT", pixels), (b"IEND", b"")]))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]


@pytest.mark.parametrize("mode", MODES)
def test_no_mode_is_clipped_to_black_or_white(mode: str) -> None:
    """Bright and dark halves stay apart, as bright as they were."""
    plain = Image.new("L", (8, 1), 40)
    plain.paste(200, (4, 0, 8, 1))
    image = in_mode(plain, mode)
    dark, bright = (to_rgb(image).getpixel((x, 0)) for x in (1, 6))
    assert max(dark) == min(dark) == 0 if mode == "1" else all(abs(value - 40) <= 6 for value in dark)
    assert all(abs(value - (255 if mode == "1" else 200)) <= 6 for value in bright)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("color", "depth"), [(color, depth) for color, depths in DEPTHS.items() for depth in depths])
def test_every_kind_of_png_is_read(color: int, depth: int, interlaced: bool) -> None:
    """Pixels as the PNG specification defines them, without Pillow."""
    chunks = png_chunks(color, depth, interlaced, side=19, seed=color * 100 + depth)
    colors = min(2**depth, 256) if color == 3 else 2**depth
    values = np.random.default_rng(color * 100 + depth).integers(0, colors, (19, 19, CHANNELS[color]))
    if color == 3:
        palette = np.frombuffer(dict(chunks)[b"PLTE"], dtype=np.uint8).reshape(-1, 3)
        expected = palette[values[..., 0]].astype(float)
    else:
        scaled = values * 255 / (2**depth - 1)
        opaque, alpha = (scaled[..., :-1], scaled[..., -1:] / 255) if color in (4, 6) else (scaled, 1.0)
        expected = np.broadcast_to(opaque * alpha + 255 * (1 - np.asarray(alpha)), (19, 19, 3))
    tolerance = 3 if color in (4, 6) and depth == 16 else 1  # of 16 bits the upper eight are kept, of colors and of their transparency
    assert np.abs(np.asarray(decode(png_of(chunks)), dtype=float) - expected).max() <= tolerance


def test_any_flipped_bit_of_a_pngs_pixels_is_found() -> None:
    data = encode(noise(24, 24))
    start = data.index(b"IDAT")
    rng = np.random.default_rng(0)
    for position in rng.integers(start, len(data) - 16, size=300):
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        with pytest.raises(ImageError, match="PNG"):
            decode(bytes(damaged))


def test_damaged_metadata_is_no_reason_to_lose_a_picture() -> None:
    image = noise(9, 9)
    information = PngInfo()
    information.add_text("Comment", "a picture")
    data = bytearray(encode(image, pnginfo=information))
    data[data.index(b"tEXt") + 6] ^= 1
    assert np.array_equal(np.asarray(decode(bytes(data))), np.asarray(image))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_color_profile_is_applied(mode: str) -> None:
    """One in which red and blue have changed places, and that is linear: the middle is brighter in sRGB."""
    red, green, blue = SRGB
    image = Image.new("RGB", (4, 4), (255, 0, 0)).convert(mode)
    turned = decode(encode(image, icc_profile=icc_profile(blue, green, red))).getpixel((0, 0))
    assert all(abs(value - expected) <= 2 for value, expected in zip(turned, (0, 0, 255), strict=True))
    gray = decode(encode(Image.new("RGB", (4, 4), (128, 128, 128)), icc_profile=icc_profile(red, green, blue))).getpixel((0, 0))
    assert all(abs(value - 188) <= 2 for value in gray)


def test_a_transparent_color_is_found_beside_a_profile() -> None:
    image = encode(Image.new("RGB", (4, 4), (100, 100, 100)), transparency=(100, 100, 100), icc_profile=icc_profile(*SRGB))
    assert decode(image).getpixel((0, 0)) == (255, 255, 255)


def test_a_gray_profile_and_transparency_are_both_applied() -> None:
    profile = gray_profile()
    plain = decode(encode(Image.new("L", (4, 4), 128), icc_profile=profile)).getpixel((0, 0))
    assert plain != (128, 128, 128)
    assert decode(encode(Image.new("L", (4, 4), 128), icc_profile=profile, transparency=7)).getpixel((0, 0)) == plain
    assert decode(encode(Image.new("L", (4, 4), 128), icc_profile=profile, transparency=128)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encode(Image.new("LA", (4, 4), (128, 0)), icc_profile=profile)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_decoded_image_is_decoded(mode: str) -> None:
    stored = io.BytesIO()
    Image.new(mode, (4, 4), 100).save(stored, "TIFF", icc_profile=icc_profile(*SRGB))
    once = decode(stored.getvalue())
    assert to_rgb(once) is once


def test_a_profile_that_does_not_fit_is_left_out() -> None:
    for broken in (b"no profile", icc_profile(*SRGB)[:200]):
        assert decode(encode(Image.new("RGB", (4, 4), (9, 8, 7)), icc_profile=broken)).getpixel((0, 0)) == (9, 8, 7)
    assert decode(encode(Image.new("L", (4, 4), 9), icc_profile=icc_profile(*SRGB))).getpixel((0, 0)) == (9, 9, 9)


def box(brand: bytes, *compatible: bytes) -> bytes:
    """The beginning of a file of ISO's base media format, with zeros after it."""
    content = b"ftyp" + brand + bytes(4) + b"".join(compatible)
    return struct.pack(">I", 4 + len(content)) + content + bytes(100)


def test_heic_is_told_by_its_bytes_and_not_by_its_name() -> None:
    assert all(is_heic(box(brand)) for brand in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"))
    assert is_heic(box(b"mif1", b"mif1", b"heic"))
    assert not is_heic(box(b"mif1", b"mif1", b"avif")) and not is_heic(box(b"avif", b"mif1"))
    assert not is_heic(encode(noise(8, 8), "AVIF")) and not is_heic(encode(noise(8, 8))) and not is_heic(b"") and not is_heic(b"ftyp")


def test_without_its_library_a_heic_file_says_which_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    for read in (decode, size_of):
        with pytest.raises(ImageError, match=r"^unreadable: a HEIC file; to read these: pip install 'cm3leon\[heic\]'$"):
            read(box(b"heic", b"mif1"))
    assert decode(encode(noise(8, 8), "AVIF")).size == (8, 8)


def test_heic_is_decoded_within_the_limit_of_pixels() -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    image = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    data = encode(image, "HEIF", quality=100)
    assert is_heic(data) and size_of(data) == decode(data).size == (96, 64)
    assert np.abs(np.asarray(decode(data)).astype(int) - np.asarray(image)).mean() < 3
    with pytest.raises(ImageError, match="decompression_bomb"):
        decode(data, 96 * 64 - 1)
    with pytest.raises(ImageError, match="unreadable"):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_an_image_is_that_of_the_decoded_one(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF"):
        data = encode(noise(12, 8), kind, exif=exif)
        assert size_of(data) == decode(data).size
    with pytest.raises(ImageError, match="unreadable"):
        size_of(b"no image")
