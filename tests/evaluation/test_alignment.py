"""The CLIP score is the cosine similarity of each image with its own text."""

import numpy as np
import pytest
from PIL import Image

from cm3leon.evaluation.alignment import clip_score


class Fixed:
    """Encodes an image by its first pixel and a text by its length, on the unit circle."""

    def encode_images(self, images: list[Image.Image]) -> np.ndarray:
        angle = np.array([image.getpixel((0, 0))[0] for image in images]) / 100
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        angle = np.array([len(text) for text in texts]) / 100
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def test_cosine_similarity_of_pairs() -> None:
    images = [Image.new("RGB", (2, 2), (value, 0, 0)) for value in (5, 50, 200)]
    scores = clip_score(Fixed(), images, ["x" * 5, "x" * 30, "x"])
    assert scores.dtype == np.float32
    assert scores == pytest.approx(np.cos([0, 0.2, 1.99]), abs=1e-6)


def test_images_and_texts_must_be_equally_many() -> None:
    with pytest.raises(ValueError, match="1 images and 0 texts"):
        clip_score(Fixed(), [Image.new("RGB", (2, 2))], [])
    assert clip_score(Fixed(), [], []).shape == (0,)
