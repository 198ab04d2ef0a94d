"""Splits share no image, no near-duplicate and no group."""

import numpy as np
import pandas as pd
import pytest

from cm3leon.data import splits
from cm3leon.data.links import linked_rows


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    return len(pairs) == len(set(one.tolist())) == len(set(other.tolist()))


def test_links_join_groups_edits_and_equal_images() -> None:
    frame = pd.DataFrame(
        {
            "id": list("abcdefgh"),
            "group": ["g", None, None, "g", None, None, None, None],
            "edited_from": [None, "a", None, None, "lost", "lost", None, None],
            "pixels": ["1", "2", "3", "4", "5", None, "3", None],
        }
    )
    found = linked_rows(splits.links_of(frame), 8)
    assert same_partition(found, np.array([0, 0, 1, 0, 2, 2, 1, 3]))


def test_a_copy_that_is_held_out_holds_out_the_others() -> None:
    frame = pd.DataFrame(
        {
            "id": list("abcdefg"),
            "pixels": ["1", "1", "2", "2", None, None, "3"],
            "split": ["train", "test", None, "val", None, "test", None],
        }
    )
    assert splits.stated_by_copies(frame).tolist() == ["test", "test", "val", "val", None, "test", None]


def test_splits_follow_fractions_and_do_not_change_when_records_are_added() -> None:
    ids = [f"{number:05d}" for number in range(6000)]
    components = np.arange(6000) // 2
    whole = splits.assign_splits(ids, components, [None] * 6000, 3, 0.1, 0.2)
    assert all(whole[row] == whole[row + 1] for row in range(0, 6000, 2))
    assert abs(whole.count("val") / 6000 - 0.1) < 0.02
    assert abs(whole.count("test") / 6000 - 0.2) < 0.02
    assert splits.assign_splits(ids[:3000], components[:3000], [None] * 3000, 3, 0.1, 0.2) == whole[:3000]
    assert splits.assign_splits(ids, components, [None] * 6000, 4, 0.1, 0.2) != whole


@pytest.mark.parametrize("seed", range(20))
def test_no_split_is_empty_and_a_giant_component_is_in_train(seed: int) -> None:
    small = splits.assign_splits([str(number) for number in range(3)], np.arange(3), [None] * 3, seed, 0.03, 0.05)
    assert sorted(small) == ["test", "train", "val"]
    giant = splits.assign_splits([str(number) for number in range(100)], np.maximum(np.arange(100) - 60, 0), [None] * 100, seed, 0.2, 0.2)
    assert set(giant[:61]) == {"train"}
    assert set(giant) == {"train", "val", "test"}


def test_too_few_components_are_an_error_that_says_what_to_do() -> None:
    with pytest.raises(splits.SplitError, match=r"5 accepted records form 2 unrelated components.*near_duplicate_distance"):
        splits.assign_splits(list("abcde"), np.array([0, 0, 0, 1, 1]), [None] * 5, 0, 0.1, 0.1)


def test_splits_that_records_state_are_kept_and_others_drawn_from_what_is_left() -> None:
    ids = [f"{number:05d}" for number in range(3000)]
    components = np.arange(3000)
    stated = ["test" if number < 100 else None if number < 1000 else "train" for number in range(3000)]
    found = splits.assign_splits(ids, components, stated, 3, 0.1, 0.2)
    assert [number for number, split in enumerate(found) if split == "test"] == list(range(100))  # and none was drawn
    assert abs(found.count("val") / 2900 - 0.1) < 0.02  # also from those that state train: no record states val
    everything = ["val" if number % 3 == 0 else "test" if number % 3 == 1 else "train" for number in range(3000)]
    assert splits.assign_splits(ids, components, everything, 3, 0.1, 0.2) == everything


def test_what_is_linked_to_a_held_out_record_is_held_out() -> None:
    components = np.array([0, 0, 0, 1, 1, 2, 3])
    found = splits.assign_splits(list("abcdefg"), components, ["train", "val", "test", "val", None, "train", None], 0, 0.1, 0.1)
    assert found == ["test", "test", "test", "val", "val", "train", "train"]


def test_stated_splits_that_leave_nothing_to_train_on_are_an_error() -> None:
    with pytest.raises(
        splits.SplitError, match=r"3 unrelated components.*of which 1 are left for train, val; each of these needs one.*column split"
    ):
        splits.assign_splits(list("abcd"), np.array([0, 1, 2, 2]), ["test", "test", None, None], 0, 0.1, 0.1)
