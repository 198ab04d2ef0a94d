"""What must not be trained on is found by image and by caption, and a list that cannot be read is an error."""

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from cm3leon.config.schema import ValidateConfig
from cm3leon.data import excluded
from cm3leon.data.excluded import Excluded
from cm3leon.data.near_duplicates import Likeness
from cm3leon.data.thumbnails import thumbnail_of
from cm3leon.utils.errors import UserError
from cm3leon.utils.texts import folded

CONFIG = ValidateConfig(max_pixels=1_000_000, max_seconds=0.5)


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(20, 200, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC)


def test_images_and_captions_below_the_directory_are_found(tmp_path: Path) -> None:
    (tmp_path / "coco" / "val").mkdir(parents=True)
    (tmp_path / "README.md").write_text("what belongs here")
    picture(0).save(tmp_path / "coco" / "val" / "0.JPG", quality=80)
    (tmp_path / "coco" / "captions.txt").write_bytes("\ufeffA dog, on a beach.\r\n\r\nTwo  cats\n".encode())
    found = Excluded.read(tmp_path, CONFIG)
    same, gray, other = picture(0), ImageEnhance.Brightness(picture(0)).enhance(0.8), picture(1)
    thumbnails = [thumbnail_of(other), b"", thumbnail_of(same.resize((50, 50))), thumbnail_of(gray)]
    assert found.images_like(thumbnails, Likeness(0.02, 6)) == [None, None, "coco/val/0.JPG", "coco/val/0.JPG"]
    assert found.images_like(thumbnails, Likeness(0.02)) == [None, None, "coco/val/0.JPG", None]
    [alike] = found.images.values()
    assert found.images_like([alike, thumbnail_of(other)], Likeness(0.0)) == ["coco/val/0.JPG", None]
    assert found.caption_of(["a bird", "a dog on a beach"]) == "coco/captions.txt line 1"
    assert found.caption_of(["TWO CATS!"]) == "coco/captions.txt line 3"
    assert found.caption_of(["", "a dog"]) is None


def test_nothing_is_excluded_without_a_list(tmp_path: Path) -> None:
    nothing = Excluded.read(tmp_path / "none", CONFIG)
    assert nothing == Excluded()
    assert nothing.images_like([thumbnail_of(picture(0)), b""], Likeness(0.02)) == [None, None]
    assert nothing.caption_of(["", "a dog"]) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.png", b"\x89PNG\r\n\x1a\n", r"cut\.png cannot be read \(unreadable.*replace or remove it"),
        ("latin.txt", "café".encode("latin-1"), r"latin\.txt cannot be read \(.*utf-8.*replace or remove it"),
        ("captions.csv", b"caption", r"captions\.csv is neither an image \(\.png.* nor a \.txt of captions"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_and_not_left_out(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        Excluded.read(tmp_path, CONFIG)


def test_an_image_that_takes_too_long_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(0).save(tmp_path / "slow.png")
    monkeypatch.setattr(excluded, "decode", lambda *arguments: time.sleep(30))
    with pytest.raises(UserError, match=r"slow\.png cannot be read \(more than 0\.5 seconds\); replace or remove it"):
        Excluded.read(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A dog.", "a dog"), ("a dog\u2014black", "a dog, black"), ("STRASSE", "stra\u00dfe"), ("cafe\u0301", "CAF\u00c9"),
        ("\ufb01sh", "fish"), (" a\u00a0\tdog ", "a dog"), ("it's", "it s"),
    ],
)  # fmt: skip
def test_texts_that_differ_in_case_punctuation_and_encoding_are_the_same(one: str, other: str) -> None:
    assert folded(one) == folded(other) != ""


@pytest.mark.parametrize(
    ("one", "other"), [("a dog", "a dogs"), ("2 dogs", "3 dogs"), ("re\u0301sume\u0301", "resume"), ("\u4e00", "\u4e8c")]
)
def test_other_words_are_other_texts(one: str, other: str) -> None:
    assert folded(one) != folded(other)


def test_a_linked_directory_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "benchmark").mkdir()
    picture(0).save(tmp_path / "benchmark" / "0.png")
    (tmp_path / "excluded").mkdir()
    (tmp_path / "excluded" / "coco").symlink_to(tmp_path / "benchmark")
    with pytest.raises(UserError, match=r"excluded/coco is a link to the directory .*/benchmark"):
        Excluded.read(tmp_path / "excluded", CONFIG)
