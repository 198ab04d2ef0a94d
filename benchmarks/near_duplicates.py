"""How many changed copies of images are found as near-duplicates: python -m benchmarks.near_duplicates IMAGES [--distance 0.02] [--bits 6]

IMAGES is a directory of photographs or drawings. Each is copied with one change at a time. The table says how many of the copies are so
close to their original that they are found, and how many pairs of different images would be.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from cm3leon.data.images import SUFFIXES, decode
from cm3leon.data.near_duplicates import HASH_BITS, LEAST_BITS, difference_hashes
from cm3leon.data.thumbnails import stack, thumbnail_of

Change = Callable[[Image.Image], Image.Image]


def _jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=50)
    return Image.open(buffer).convert("RGB")


def _cropped(share: float) -> Change:
    return lambda image: image.crop(
        (round(image.width * share), round(image.height * share), round(image.width * (1 - share)), round(image.height * (1 - share)))
    )


CHANGES: dict[str, Change] = {
    "JPEG of quality 50": _jpeg,
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "brightness x 0.7": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "brightness x 1.3": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "contrast x 0.7": lambda image: ImageEnhance.Contrast(image).enhance(0.7),
    "gray": lambda image: image.convert("L").convert("RGB"),
    "1 % cropped on each side": _cropped(0.01),
    "3 % cropped on each side": _cropped(0.03),
}


def distances(one_ND: np.ndarray, other_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of thumbnails as ``validate.near_duplicate_distance``, and bits in which their hashes differ."""
    squares = (one_ND.astype(np.float64) - other_ND) ** 2
    one_NH, other_NH = difference_hashes(one_ND), difference_hashes(other_ND)
    bits = np.bitwise_count(one_NH ^ other_NH).sum(axis=-1)
    flat = np.minimum(np.bitwise_count(one_NH).sum(axis=-1), np.bitwise_count(other_NH).sum(axis=-1)) < LEAST_BITS
    return np.sqrt(squares.mean(axis=-1)) / 255, np.where(flat, HASH_BITS, bits)  # without a hash, like none


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--distance", type=float, default=0.02, help="validate.near_duplicate_distance")
    parser.add_argument("--bits", type=int, default=6, help="validate.near_duplicate_bits")
    options = parser.parse_args()
    files = sorted(file for file in options.images.rglob("*") if file.suffix.lower() in SUFFIXES)
    images = [decode(file.read_bytes()) for file in files]
    originals = stack([thumbnail_of(image) for image in images])

    def row(name: str, distance: np.ndarray, bits: np.ndarray) -> str:
        close, alike = distance < options.distance, bits <= options.bits
        shares = " | ".join(f"{found.mean():.2%}" for found in (close, alike, close | alike))
        return f"| {name} | {shares} | {np.median(bits):.0f} ({bits.min()} to {bits.max()}) |"

    print(f"{len(images)} images\n\n| | thumbnails | hashes | either | bits that differ |\n|---|---|---|---|---|")
    for name, change in CHANGES.items():
        print(row(name, *distances(originals, stack([thumbnail_of(change(image)) for image in images]))))
    first, second = np.triu_indices(len(images), 1)
    print(row("pairs of different images", *distances(originals[first], originals[second])))


if __name__ == "__main__":
    main()
