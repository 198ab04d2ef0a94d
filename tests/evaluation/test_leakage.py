"""Evaluation refuses records that the model may have seen."""

import io

import numpy as np
import pytest
from PIL import Image

from cm3leon.data.thumbnails import ThumbnailError, thumbnail_of, write_thumbnails
from cm3leon.evaluation.leakage import LeakageError, check


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return {f"p{n}": Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).resize((64, 64)) for n in range(8)}


@pytest.fixture
def validated(images, tmp_path, monkeypatch):
    """A directory with the thumbnails of the images; from then on no image can be decoded."""
    buffer = io.BytesIO()
    images["p0"].save(buffer, "JPEG", quality=90)
    images["copy"] = Image.open(buffer).convert("RGB")
    write_thumbnails(tmp_path, list(images), [thumbnail_of(image) for image in images.values()])
    monkeypatch.setattr(Image, "open", lambda *arguments, **options: pytest.fail("an image is decoded"))
    return tmp_path


def test_unseen_records_pass_and_no_image_is_decoded(validated):
    check(["p0", "p1"], ["p2", "p3"], ["p2"], validated, 0.01)


@pytest.mark.parametrize(
    ("train", "memory", "message"),
    [
        (["p1", "p3"], [], "1 test records are also in training, for example p1"),
        (["p2"], ["p0"], "1 test records are also in the memory bank, for example p0"),
    ],
)
def test_a_known_record_is_refused(validated, train, memory, message):
    with pytest.raises(LeakageError, match=message):
        check(["p0", "p1"], train, memory, validated, 0.01)


def test_a_near_duplicate_is_refused(validated):
    with pytest.raises(LeakageError, match=r"1 test records are near-duplicates of training images, for example p0 \(like copy\)"):
        check(["p0", "p1"], ["p2", "copy"], [], validated, 0.02)
    check(["p0", "p1"], ["p2", "copy"], [], validated, 0.0)


def test_missing_thumbnails_are_an_error_that_names_the_command(validated, tmp_path):
    with pytest.raises(ThumbnailError, match="lacks 1 records of the manifest, for example p9; run validate again: cm3leon validate"):
        check(["p9"], ["p2"], [], validated, 0.01)
    with pytest.raises(ThumbnailError, match=r"thumbnails\.parquet does not exist; run validate again.*cm3leon validate"):
        check(["p0"], ["p2"], [], tmp_path / "elsewhere", 0.01)
