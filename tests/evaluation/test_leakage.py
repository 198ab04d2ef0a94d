"""What a model may have seen is refused."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cm3leon.evaluation.leakage import LeakageError, check


class Store:
    """Images by name."""

    def __init__(self, images):
        self.images = images

    def open(self, ref):
        return self.images[ref]


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    return {f"p{n}": Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).resize((64, 64)) for n in range(8)}


def rows(*names):
    return pd.DataFrame({"id": [f"id-{name}" for name in names], "image": names})


def test_unseen_documents_pass(pictures):
    check(rows("p0", "p1"), rows("p2", "p3"), ["id-p2"], Store(pictures), 0.01)


@pytest.mark.parametrize(
    ("train", "memory", "message"),
    [(("p1", "p3"), [], "1 held-out documents stand in training, for example id-p1"), (("p2",), ["id-p0"], "stand in the memory bank")],
)
def test_a_known_document_is_refused(pictures, train, memory, message):
    with pytest.raises(LeakageError, match=message):
        check(rows("p0", "p1"), rows(*train), memory, Store(pictures), 0.01)


def test_a_near_duplicate_is_refused(pictures):
    buffer = io.BytesIO()
    pictures["p0"].save(buffer, "JPEG", quality=90)
    pictures["copy"] = Image.open(buffer).convert("RGB")
    with pytest.raises(
        LeakageError, match=r"1 held-out documents are near-duplicates of training images, for example id-p0 \(like id-copy\)"
    ):
        check(rows("p0", "p1"), rows("p2", "copy"), [], Store(pictures), 0.02)
    check(rows("p0", "p1"), rows("p2", "copy"), [], Store(pictures), 0.0)
