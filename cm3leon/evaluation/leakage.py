"""Evaluation refuses test records that the model may have seen, by id or as near-duplicates, in training or in the memory bank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cm3leon.data.splits import near_duplicate_groups
from cm3leon.data.thumbnails import read_thumbnails
from cm3leon.utils.errors import UserError

EXAMPLES = 3
"""Most records that an error names."""


class LeakageError(UserError):
    """Test records are known to the model, so its scores would not be of unseen data."""


def check(test: Sequence[str], train: Sequence[str], memory: Sequence[str], validated: Path, distance: float) -> None:
    """Compare the ids of the test records with those of the training records and of the memory bank.

    No image is decoded: near-duplicates are found by the thumbnails that ``validate`` left.

    Args:
        validated: directory of the validated manifest and its thumbnails.
        distance: below which two images are near-duplicates (``validate.near_duplicate_distance``).

    Raises:
        LeakageError: naming some of the test records that are known.
        ThumbnailError: if ``validated`` has no thumbnails of them.
    """
    # 1. The same record: ids are hashes of image files.
    for where, known in (("training", set(train)), ("the memory bank", set(memory))):
        if both := sorted(set(test) & known):
            raise LeakageError(_message(len(both), f"are also in {where}", both))

    # 2. Near-duplicates of training images. Groups are numbered alike for test and training records.
    groups = near_duplicate_groups(read_thumbnails(validated, [*test, *train]), distance).tolist()
    test_groups, train_groups = groups[: len(test)], groups[len(test) :]
    training_record = dict(zip(train_groups, train, strict=True))
    pairs = [
        f"{test_id} (like {training_record[group]})" for test_id, group in zip(test, test_groups, strict=True) if group in training_record
    ]
    if pairs:
        raise LeakageError(_message(len(pairs), "are near-duplicates of training images", pairs))


def seen(test: Sequence[str], collection: Sequence[str], known: Sequence[str], validated: Path, distance: float) -> list[str]:
    """Ids of the test records that a model of other data has seen in training, by id or as near-duplicates.

    Args:
        collection: ids of all records of the present manifest.
        known: ids of the model's training records. Those that are no longer in the collection have no thumbnails, so that near-duplicates
            of them are not found.
        validated, distance: see :func:`check`.
    """
    trained = sorted(set(known) & set(collection))
    groups = near_duplicate_groups(read_thumbnails(validated, [*test, *trained]), distance).tolist()
    test_groups, known_groups = groups[: len(test)], set(groups[len(test) :])
    return [test_id for test_id, group in zip(test, test_groups, strict=True) if group in known_groups]


def _message(count: int, problem: str, examples: Sequence[str]) -> str:
    return (
        f"{count} test records {problem}, for example {', '.join(examples[:EXAMPLES])}; scores would not be of unseen data. "
        "Run validate again, which keeps the splits disjoint, and train again; or evaluate on other data"
    )
