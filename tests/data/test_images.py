"""The decoder accepts any mode and refuses damaged, truncated and huge files."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from cm3leon.data.images import ImageError, decode, fit_square, to_rgb


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8))


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
