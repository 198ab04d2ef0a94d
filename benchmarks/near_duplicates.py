"""Near-duplicates: what is found, and how fast.

    python -m benchmarks.near_duplicates IMAGES [--distance 0.02] [--bits 6]
    python -m benchmarks.near_duplicates --search COUNT... [--rounds 3]

IMAGES is a directory of photographs or drawings. Each is copied with one change at a time. The table says how many of the copies are so
close to their original that they are found, and how many pairs of different images would be.

``--search`` compares the sweep with FAISS's exhaustive range search, on that many painted scenes, made-up thumbnails in clusters, and
made-up embeddings. The two alternate and must find the same groups. Times are from thumbnails or embeddings to groups.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from benchmarks.retrieval import synthetic
from cm3leon.config.ingest_schema import ShapesConfig
from cm3leon.data.images import SUFFIXES, decode
from cm3leon.data.links import components
from cm3leon.data.near_duplicates import HASH_BITS, LEAST_BITS, Likeness, difference_hashes, near_duplicate_groups, similar_groups
from cm3leon.data.thumbnails import FEATURES, stack, thumbnail_of
from cm3leon.retrieval.vectors import normalize
from cm3leon.scenes.scene import sample_scene

Change = Callable[[Image.Image], Image.Image]
PAIRS = 100_000
"""Pairs of images that are compared at once."""


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


def painted(count: int) -> np.ndarray:
    """Thumbnails of scenes of the source ``shapes``, uint8 (count, D)."""
    config, rng = ShapesConfig(), random.Random(0)
    scenes = (sample_scene(rng, config.max_objects, config.grid, config.letters) for _ in range(count))
    return stack([thumbnail_of(Image.fromarray(scene.render(config.size))) for scene in scenes])


def clustered(count: int) -> np.ndarray:
    """Made-up thumbnails, uint8 (count, D): half as many pictures, each with copies of more or less noise."""
    rng = np.random.default_rng(0)
    pictures = 12 * rng.normal(size=(count // 2, 12)) @ rng.normal(size=(12, FEATURES)) + 128
    pictures += rng.normal(0, 30, (count // 2, 1)) + rng.normal(0, 10, (count // 2, FEATURES))
    copies = pictures[rng.integers(0, count // 2, count)]
    return np.clip(copies + rng.normal(size=copies.shape) * rng.uniform(0, 8, (count, 1)), 0, 255).astype(np.uint8)


def embedded(count: int) -> np.ndarray:
    """Made-up embeddings, float32 (count, 512), of which every tenth is a near-copy of the one before."""
    vectors = synthetic(count, 512)[1].astype(np.float32)
    copies = vectors[8::10][: len(vectors[9::10])]
    vectors[9::10] = copies + 0.01 * np.random.default_rng(0).standard_normal(copies.shape, dtype=np.float32)
    return normalize(vectors)


def exhaustive_groups(points_ND: np.ndarray, squared_limit: float) -> np.ndarray:
    """Component numbers, (N,): each point is compared with all before it by FAISS, as many at a time as the sweep does."""
    import faiss

    first, second, block, stripe = [], [], 1024, 8192
    for left in range(0, len(points_ND), stripe):
        index = faiss.IndexFlatL2(points_ND.shape[1])
        index.add(points_ND[left : left + stripe])
        for start in range(left, len(points_ND), block):
            limits, _, found = index.range_search(points_ND[start : start + block], squared_limit)
            counts = (limits[1:] - limits[:-1]).astype(np.int64)
            rows = np.repeat(np.arange(start, start + len(counts)), counts)
            before = found + left < rows
            first.append(found[before] + left)
            second.append(rows[before])
    return components(np.concatenate(first), np.concatenate(second), len(points_ND))


def exhaustive_thumbnails(thumbnails_ND: np.ndarray, distance: float) -> np.ndarray:
    """:func:`exhaustive_groups` of thumbnails closer than ``distance``."""
    unique_UD, inverse = np.unique(thumbnails_ND, axis=0, return_inverse=True)
    return exhaustive_groups(unique_UD.astype(np.float32) - 128, (distance * 255) ** 2 * FEATURES)[inverse.reshape(-1)]


Search = Callable[[np.ndarray], np.ndarray]
COLLECTIONS: dict[str, tuple[Callable[[int], np.ndarray], Search, Search]] = {
    "painted scenes, thumbnails closer than 0.01": (
        painted,
        lambda points: near_duplicate_groups(points, Likeness(0.01)),
        lambda points: exhaustive_thumbnails(points, 0.01),
    ),
    "clusters, thumbnails closer than 0.02": (
        clustered,
        lambda points: near_duplicate_groups(points, Likeness(0.02)),
        lambda points: exhaustive_thumbnails(points, 0.02),
    ),
    "embeddings, cosine above 0.95": (
        embedded,
        lambda points: similar_groups(points, 0.95),
        lambda points: exhaustive_groups(points, 2 - 2 * 0.95),
    ),
}
"""What is compared: the points, the sweep, and FAISS."""


def time_search(counts: list[int], rounds: int) -> None:
    """Print a row for each collection and number of images: medians and ranges of seconds, and of the ratios of each round."""
    print("| | images | groups | sweep, s | FAISS, s | FAISS / sweep |\n|---|---|---|---|---|---|")
    for name, (make, sweep, exhaustive) in COLLECTIONS.items():
        for count in counts:
            points, times = make(count), []
            for _ in range(rounds):
                ends = [time.perf_counter()]
                swept = sweep(points)
                ends.append(time.perf_counter())
                searched = exhaustive(points)
                ends.append(time.perf_counter())
                times.append(np.diff(ends).tolist())
            groups = len(set(zip(swept.tolist(), searched.tolist(), strict=True)))
            assert groups == len(set(swept.tolist())) == len(set(searched.tolist())), "the groups differ"
            columns = [*zip(*times, strict=True), [other / own for own, other in times]]
            cells = " | ".join(f"{statistics.median(column):.3g} ({min(column):.3g}–{max(column):.3g})" for column in columns)
            print(f"| {name} | {count:,} | {groups:,} | {cells} |", flush=True)


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("images", type=Path, nargs="?")
    what.add_argument("--search", type=int, nargs="+", metavar="COUNT", help="numbers of images to search")
    parser.add_argument("--rounds", type=int, default=3, help="of the two searches in turn")
    parser.add_argument("--distance", type=float, default=0.02, help="validate.near_duplicate_distance")
    parser.add_argument("--bits", type=int, default=6, help="validate.near_duplicate_bits")
    options = parser.parse_args()
    if options.search:
        time_search(options.search, options.rounds)
        return
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
    blocks = [slice(start, start + PAIRS) for start in range(0, len(first), PAIRS)]
    found = [distances(originals[first[block]], originals[second[block]]) for block in blocks]
    distance, bits = (np.concatenate(values) for values in zip(*found, strict=True))
    print(row("pairs of different images", distance, bits))


if __name__ == "__main__":
    main()
