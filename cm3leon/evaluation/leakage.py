"""Evaluation refuses what a model may have seen: documents that stand, by hash or as near-duplicates, in training or in the memory bank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from cm3leon.data.manifest import ImageStore
from cm3leon.data.splits import near_duplicate_groups
from cm3leon.data.validation import thumbnail_of
from cm3leon.utils.errors import UserError
from cm3leon.utils.progress import track

EXAMPLES = 3


class LeakageError(UserError):
    """Held-out documents are known to the model, so figures of it would say nothing."""


def check(test: pd.DataFrame, train: pd.DataFrame, memory: Sequence[str], store: ImageStore, distance: float) -> None:
    """Compare the held-out rows of a manifest with the training rows and with the ids of the memory bank.

    Args:
        distance: below which two images are near-duplicates (``validate.near_duplicate_distance``).

    Raises:
        LeakageError: naming some of what stands on both sides.
    """
    for where, known in (("in training", set(train["id"])), ("in the memory bank", set(memory))):
        if both := sorted(set(test["id"]) & known):
            raise LeakageError(_message(len(both), f"stand {where}", both))
    names = [*test["id"], *train["id"]]
    refs = [*test["image"], *train["image"]]
    seen = track(refs, "looking for near-duplicates", unit="images")
    thumbnails = np.frombuffer(b"".join(thumbnail_of(store.open(ref)) for ref in seen), dtype=np.uint8)
    groups = near_duplicate_groups(thumbnails.reshape(len(refs), -1), distance)
    known_groups = {int(group): name for group, name in zip(groups[len(test) :], names[len(test) :], strict=True)}
    pairs = [
        f"{name} (like {known_groups[int(group)]})" for name, group in zip(test["id"], groups, strict=False) if int(group) in known_groups
    ]
    if pairs:
        raise LeakageError(_message(len(pairs), "are near-duplicates of training images", pairs))


def _message(count: int, what: str, examples: Sequence[str]) -> str:
    return (
        f"{count} held-out documents {what}, for example {', '.join(examples[:EXAMPLES])}; scores would not be of unseen data. "
        "Run validate again, which keeps splits apart, and train anew; or evaluate on other data"
    )
