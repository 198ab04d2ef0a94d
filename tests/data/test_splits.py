"""Splits share no image, no near-duplicate and no group."""

import numpy as np
import pandas as pd
import pytest
from scipy.sparse.csgraph import connected_components

from cm3leon.data import splits


def brute_force(points: np.ndarray, distance: float) -> np.ndarray:
    values = points.astype(np.float64) / 255
    near = np.sqrt(((values[:, None] - values[None]) ** 2).mean(axis=2)) < distance
    return connected_components(near | np.eye(len(points), dtype=bool), directed=False)[1]


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    return len(pairs) == len(set(one.tolist())) == len(set(other.tolist()))


@pytest.mark.parametrize("distance", [0.005, 0.02, 0.05, 0.2])
def test_components_are_those_of_comparing_all_pairs(distance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "BLOCK", 37)
    monkeypatch.setattr(splits, "STRIPE", 53)
    monkeypatch.setattr(splits, "MAX_EDGES", 100)  # edges are replaced by a spanning forest several times
    rng = np.random.default_rng(0)
    centers = rng.integers(0, 256, (40, 192))
    points = np.clip(centers[rng.integers(0, 40, 400)] + rng.normal(0, rng.uniform(0, 12, (400, 1)), (400, 192)), 0, 255).astype(np.uint8)
    points[50] = points[7]
    found = splits.near_duplicate_groups(points, distance)
    expected = brute_force(points, distance)
    assert same_partition(found, expected)
    assert 1 < len(set(expected.tolist())) <= 400


def test_a_distance_of_zero_joins_nothing() -> None:
    assert len(set(splits.near_duplicate_groups(np.zeros((5, 192), dtype=np.uint8), 0).tolist())) == 5
    assert len(set(splits.near_duplicate_groups(np.zeros((5, 192), dtype=np.uint8), 0.01).tolist())) == 1


def test_links_join_groups_edits_and_equal_images() -> None:
    frame = pd.DataFrame(
        {
            "id": list("abcdefgh"),
            "group": ["g", None, None, "g", None, None, None, None],
            "edited_from": [None, "a", None, None, "lost", "lost", None, None],
            "pixels": ["1", "2", "3", "4", "5", None, "3", None],
        }
    )
    found = splits.linked_rows(splits.links_of(frame), 8)
    assert same_partition(found, np.array([0, 0, 1, 0, 2, 2, 1, 3]))


def test_splits_follow_fractions_and_do_not_change_when_records_are_added() -> None:
    ids = [f"{number:05d}" for number in range(6000)]
    components = np.arange(6000) // 2
    whole = splits.assign_splits(ids, components, 3, 0.1, 0.2)
    assert all(whole[row] == whole[row + 1] for row in range(0, 6000, 2))
    assert abs(whole.count("val") / 6000 - 0.1) < 0.02
    assert abs(whole.count("test") / 6000 - 0.2) < 0.02
    assert splits.assign_splits(ids[:3000], components[:3000], 3, 0.1, 0.2) == whole[:3000]
    assert splits.assign_splits(ids, components, 4, 0.1, 0.2) != whole


@pytest.mark.parametrize("seed", range(20))
def test_no_split_is_empty_and_a_giant_component_is_in_train(seed: int) -> None:
    small = splits.assign_splits([str(number) for number in range(3)], np.arange(3), seed, 0.03, 0.05)
    assert sorted(small) == ["test", "train", "val"]
    giant = splits.assign_splits([str(number) for number in range(100)], np.maximum(np.arange(100) - 60, 0), seed, 0.2, 0.2)
    assert set(giant[:61]) == {"train"}
    assert set(giant) == {"train", "val", "test"}


def test_too_few_components_are_an_error_that_says_what_to_do() -> None:
    with pytest.raises(splits.SplitError, match=r"5 accepted records form 2 unrelated components.*near_duplicate_distance"):
        splits.assign_splits(list("abcde"), np.array([0, 0, 0, 1, 1]), 0, 0.1, 0.1)
