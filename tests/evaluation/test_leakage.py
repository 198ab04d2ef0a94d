"""Evaluation refuses records that the model may have seen."""

import io

import numpy as np
import pytest
from PIL import Image

from cm3leon.data.near_duplicates import Likeness
from cm3leon.data.thumbnails import ThumbnailError, thumbnail_of, write_thumbnails
from cm3leon.evaluation import leakage
from cm3leon.evaluation.leakage import Known, LeakageError, check, like_training


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
    check(["p0", "p1"], ["p2", "p3"], ["p2"], validated, Likeness(0.01))


@pytest.mark.parametrize(
    ("train", "memory", "message"),
    [
        (["p1", "p3"], [], "1 test records are also in training, for example p1"),
        (["p2"], ["p0"], "1 test records are also in the memory bank, for example p0"),
    ],
)
def test_a_known_record_is_refused(validated, train, memory, message):
    with pytest.raises(LeakageError, match=message):
        check(["p0", "p1"], train, memory, validated, Likeness(0.01))


def test_a_near_duplicate_is_refused(validated):
    with pytest.raises(LeakageError, match=r"1 test records are near-duplicates of training images, for example p0 \(like copy\)"):
        check(["p0", "p1"], ["p2", "copy"], [], validated, Likeness(0.02))
    check(["p0", "p1"], ["p2", "copy"], [], validated, Likeness(0.0))


def test_missing_thumbnails_are_an_error_that_names_the_command(validated, tmp_path):
    with pytest.raises(ThumbnailError, match="lacks 1 records of the manifest, for example p9; run validate again: cm3leon validate"):
        check(["p9"], ["p2"], [], validated, Likeness(0.01))
    with pytest.raises(ThumbnailError, match=r"thumbnails\.parquet does not exist; run validate again.*cm3leon validate"):
        check(["p0"], ["p2"], [], tmp_path / "elsewhere", Likeness(0.01))


def test_embeddings_too_like_one_of_training_are_found_in_every_part_of_training(monkeypatch):
    monkeypatch.setattr(leakage, "CHUNK", 7)
    rng = np.random.default_rng(0)
    test, training = (
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (rng.normal(size=(30, 4)), rng.normal(size=(50, 4)))
    )
    found = like_training(test, training.astype(np.float16), 0.95)
    assert found.tolist() == ((test @ training.astype(np.float16).astype(np.float64).T).max(1) > 0.95).tolist()
    assert 0 < found.sum() < 30


def test_prompts_are_told_from_those_that_stand_in_training():
    known = Known.of([["A dog, on a beach.", "two dogs"], ["a small red circle on white", "a cat"]])
    assert known.choose_prompt(["a dog on a BEACH"]) == ("a dog on a BEACH", "seen_prompts")
    assert known.choose_prompt(["a cat", "the cat"]) == ("the cat", "unseen")  # the first that does not
    assert known.choose_prompt([" ", "a dog\u2014on a beach"]) == ("a dog\u2014on a beach", "seen_prompts")
    # Scenes are known by what is said of them, whichever the words.
    assert known.choose_prompt(["A white background with a large red circle"])[1] == "seen_prompts"
    assert known.choose_prompt(["a red circle on gray"])[1] == "unseen"
    assert known.choose_prompt(["a red circle"])[1] == "unseen"


def test_prompts_of_combinations_that_no_caption_of_training_names_are_new():
    known = Known.of([["a red circle left of a blue square on white"], ["a blue circle above a green ring"], ["a red square", "a cat"]])
    assert known.choose_prompt(["a red circle on gray", "a green circle on gray"]) == ("a green circle on gray", "new_combinations")
    assert known.choose_prompt(["a blue square right of a red circle"])[1] == "unseen"  # the same relation
    assert known.choose_prompt(["a blue square left of a red circle"])[1] == "new_combinations"
    assert known.choose_prompt(["a green ring below a blue circle on white"])[1] == "unseen"
    assert known.choose_prompt(["the letter A in green"])[1] == "unseen"  # letters are no shapes
    assert known.choose_prompt(["a green dog"])[1] == "unseen"
