"""Near-duplicates are what a comparison of all pairs finds."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.sparse.csgraph import connected_components

from cm3leon.data import near_duplicates
from cm3leon.data.near_duplicates import HASH_BITS, LEAST_BITS, Likeness, difference_hashes, near_duplicate_groups, similar_groups
from cm3leon.data.thumbnails import SIDE, stack, thumbnail_of


def brute_force(points: np.ndarray, distance: float) -> np.ndarray:
    values = points.astype(np.float64) / 255
    near = np.sqrt(((values[:, None] - values[None]) ** 2).mean(axis=2)) < distance
    return connected_components(near | np.eye(len(points), dtype=bool), directed=False)[1]


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    return len(pairs) == len(set(one.tolist())) == len(set(other.tolist()))


@pytest.mark.parametrize("distance", [0.005, 0.02, 0.05, 0.2])
def test_components_are_those_of_comparing_all_pairs(distance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "BLOCK", 37)
    monkeypatch.setattr(near_duplicates, "STRIPE", 53)
    monkeypatch.setattr(near_duplicates, "MAX_EDGES", 100)  # edges are replaced by a spanning forest several times
    rng = np.random.default_rng(0)
    centers = rng.integers(0, 256, (40, 192))
    points = np.clip(centers[rng.integers(0, 40, 400)] + rng.normal(0, rng.uniform(0, 12, (400, 1)), (400, 192)), 0, 255).astype(np.uint8)
    points[50] = points[7]
    found = near_duplicate_groups(points, Likeness(distance))
    expected = brute_force(points, distance)
    assert same_partition(found, expected)
    assert 1 < len(set(expected.tolist())) <= 400


@pytest.mark.parametrize("similarity", [0.5, 0.8, 0.95, 0.999])
def test_groups_of_embeddings_are_those_of_comparing_all_pairs(similarity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "BLOCK", 37)
    monkeypatch.setattr(near_duplicates, "STRIPE", 53)
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(40, 32))[rng.integers(0, 40, 400)] + rng.normal(size=(400, 32)) * rng.uniform(0, 0.7, (400, 1))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = connected_components(vectors @ vectors.T > similarity, directed=False)[1]
    assert same_partition(similar_groups(vectors.astype(np.float32), similarity), expected)
    assert 1 < len(set(expected.tolist())) < 400


def test_a_distance_of_zero_joins_nothing() -> None:
    assert len(set(near_duplicate_groups(np.zeros((5, 192), dtype=np.uint8), Likeness(0)).tolist())) == 5
    assert len(set(near_duplicate_groups(np.zeros((5, 192), dtype=np.uint8), Likeness(0.01)).tolist())) == 1


def reference_hash(thumbnail: np.ndarray) -> list[bool]:
    """Written out: brightness of each pixel against its right and its lower neighbor."""
    gray = [[0.299 * r + 0.587 * g + 0.114 * b for r, g, b in row] for row in thumbnail.reshape(SIDE, SIDE, 3).tolist()]
    across = [gray[y][x + 1] - gray[y][x] > near_duplicates.CONTRAST for y in range(SIDE) for x in range(SIDE - 1)]
    return across + [gray[y + 1][x] - gray[y][x] > near_duplicates.CONTRAST for y in range(SIDE - 1) for x in range(SIDE)]


@pytest.mark.parametrize("bits", [1, 3, 6, 12])
def test_hashes_join_what_comparing_all_pairs_of_hashes_joins(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "BLOCK", 37)
    monkeypatch.setattr(near_duplicates, "MAX_EDGES", 100)
    rng = np.random.default_rng(1)
    centers = rng.integers(0, 256, (30, 192))
    noise = rng.normal(0, rng.uniform(0, 25, (300, 1)), (300, 192))
    points = np.clip(centers[rng.integers(0, 30, 300)] + noise, 0, 255).astype(np.uint8)
    points[5:8] = 200  # flat: no hash, so that they are not alike
    hashes = np.array([reference_hash(point) for point in points])
    assert np.array_equal(np.unpackbits(difference_hashes(points), axis=1)[:, :HASH_BITS], hashes)
    known = hashes.sum(1) >= LEAST_BITS
    alike = ((hashes[:, None] != hashes[None]).sum(2) <= bits) & known[:, None] & known[None]
    expected = connected_components(alike | np.eye(300, dtype=bool), directed=False)[1]
    assert same_partition(near_duplicate_groups(points, Likeness(0, bits)), expected)
    assert 30 < len(set(expected.tolist())) < 300


def test_the_same_picture_in_other_clothes_is_found_and_other_pictures_are_not() -> None:
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(20, 200, (12, 12, 3), dtype=np.uint8)).resize((96, 96), Image.Resampling.BICUBIC) for _ in range(40)
    ]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "JPEG", quality=50)
    changed = {
        "saved as a JPEG": Image.open(buffer).convert("RGB"),
        "reduced": pictures[1].resize((40, 40)),
        "darker": ImageEnhance.Brightness(pictures[2]).enhance(0.75),
        "brighter": ImageEnhance.Brightness(pictures[3]).enhance(1.2),
        "less contrast": ImageEnhance.Contrast(pictures[4]).enhance(0.8),
        "gray": pictures[5].convert("L").convert("RGB"),
    }
    groups = near_duplicate_groups(stack([thumbnail_of(image) for image in [*pictures, *changed.values()]]), Likeness(0.02, 6)).tolist()
    assert len(set(groups[:40])) == 40
    assert dict(zip(changed, groups[40:], strict=True)) == dict(zip(changed, groups[:6], strict=True))
    without_hashes = near_duplicate_groups(
        stack([thumbnail_of(image) for image in [*pictures, *changed.values()]]), Likeness(0.02)
    ).tolist()
    assert [own == other for own, other in zip(without_hashes[40:], without_hashes[:6], strict=True)] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]
