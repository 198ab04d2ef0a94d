"""What the model may have seen of the test records.

- :func:`check` refuses records that occur, by id or as near-duplicates, in training or in the memory bank.
- :func:`like_training` finds those whose embeddings are too close to one of training.
- :class:`Known` tells prompts that stand in training, and prompts of new combinations, from others.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cm3leon.data.manifest import first_caption
from cm3leon.data.near_duplicates import Likeness, near_duplicate_groups
from cm3leon.data.thumbnails import read_thumbnails
from cm3leon.scenes import composition
from cm3leon.scenes.scene import Combination
from cm3leon.utils.errors import UserError
from cm3leon.utils.texts import folded, is_blank

EXAMPLES = 3
"""Most records that an error names."""
CHUNK = 65_536
"""Training embeddings that are searched at once."""

Kind = Literal["unseen", "seen_prompts", "new_combinations"]
"""A prompt that does not stand in training; one that does; one with a color or a relation of shapes that no caption of training names."""


class LeakageError(UserError):
    """Test records are known to the model, so its scores would not be of unseen data."""


def check(test: Sequence[str], train: Sequence[str], memory: Sequence[str], validated: Path, likeness: Likeness) -> None:
    """Compare the ids of the test records with those of the training records and of the memory bank.

    No image is decoded: near-duplicates are found by the thumbnails that ``validate`` left.

    Args:
        validated: directory of the validated manifest and its thumbnails.
        likeness: when two images are near-duplicates.

    Raises:
        LeakageError: naming some of the test records that are known.
        ThumbnailError: if ``validated`` has no thumbnails of them.
    """
    # 1. The same record: ids are hashes of image files.
    for where, known in (("training", set(train)), ("the memory bank", set(memory))):
        if both := sorted(set(test) & known):
            raise LeakageError(_message(len(both), f"are also in {where}", both))

    # 2. Near-duplicates of training images. Groups are numbered alike for test and training records.
    groups = near_duplicate_groups(read_thumbnails(validated, [*test, *train]), likeness).tolist()
    test_groups, train_groups = groups[: len(test)], groups[len(test) :]
    training_record = dict(zip(train_groups, train, strict=True))
    pairs = [
        f"{test_id} (like {training_record[group]})" for test_id, group in zip(test, test_groups, strict=True) if group in training_record
    ]
    if pairs:
        raise LeakageError(_message(len(pairs), "are near-duplicates of training images", pairs))


def seen(test: Sequence[str], collection: Sequence[str], known: Sequence[str], validated: Path, likeness: Likeness) -> list[str]:
    """Ids of the test records that a model of other data has seen in training, by id or as near-duplicates.

    Args:
        collection: ids of all records of the present manifest.
        known: ids of the model's training records. Those that are no longer in the collection have no thumbnails, so that near-duplicates
            of them are not found.
        validated, likeness: see :func:`check`.
    """
    trained = sorted(set(known) & set(collection))
    groups = near_duplicate_groups(read_thumbnails(validated, [*test, *trained]), likeness).tolist()
    test_groups, known_groups = groups[: len(test)], set(groups[len(test) :])
    return [test_id for test_id, group in zip(test, test_groups, strict=True) if group in known_groups]


def like_training(test_ND: np.ndarray, training_MD: np.ndarray, similarity: float) -> np.ndarray:
    """Which test images have an embedding whose cosine to one of training is greater than ``similarity``, bool (N,).

    Args:
        test_ND, training_MD: image embeddings of unit length; those of training may be memory-mapped, in any float type.
    """
    import faiss

    found = np.zeros(len(test_ND), dtype=bool)
    queries_ND = np.ascontiguousarray(test_ND, dtype=np.float32)
    for start in range(0, len(training_MD), CHUNK):
        index = faiss.IndexFlatIP(queries_ND.shape[1])
        index.add(np.ascontiguousarray(training_MD[start : start + CHUNK], dtype=np.float32))
        limits, _, _ = index.range_search(queries_ND, similarity)
        found |= np.diff(limits.astype(np.int64)) > 0
    return found


@dataclass(frozen=True)
class Known:
    """What the captions of training say.

    Attributes:
        prompts: each caption as :func:`_said`.
        combinations: of all captions (:attr:`~cm3leon.scenes.scene.Scene.combinations`).
    """

    prompts: frozenset[Hashable]
    combinations: frozenset[Combination]

    @classmethod
    def of(cls, captions: Iterable[Sequence[str]]) -> Known:
        """What the captions of training records say."""
        texts = [text for own in captions for text in own]
        return cls(frozenset(map(_said, texts)), frozenset().union(*map(_combinations, texts)))

    def choose_prompt(self, captions: Sequence[str]) -> tuple[str, Kind]:
        """The prompt of a test record: a caption with a new combination, else one that does not stand in training, else the first."""
        own = [text for text in map(str, captions) if not is_blank(text)]
        for text in own:
            if not _combinations(text) <= self.combinations:
                return text, "new_combinations"
        for text in own:
            if _said(text) not in self.prompts:
                return text, "unseen"
        return first_caption(captions), "seen_prompts"


def _combinations(caption: str) -> frozenset[Combination]:
    statement = composition.parse_caption(caption)
    return composition.combinations(statement) if statement else frozenset()


def _said(caption: str) -> Hashable:
    """What two captions that say the same have in common: the words, or of a caption of a scene its content, in whichever words."""
    statement = composition.parse_caption(caption)
    return (statement and composition.content(statement)) or folded(caption)


def _message(count: int, problem: str, examples: Sequence[str]) -> str:
    return (
        f"{count} test records {problem}, for example {', '.join(examples[:EXAMPLES])}; scores would not be of unseen data. "
        "Run validate again, which keeps the splits disjoint, and train again; or evaluate on other data"
    )
