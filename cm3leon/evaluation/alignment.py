"""CLIP score: how well images match texts, as the cosine similarity of their CLIP embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


class ImageEncoder(Protocol):
    """A network that turns images into features (n, d)."""

    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray: ...


class TextImageEncoder(ImageEncoder, Protocol):
    """A CLIP model, such as :class:`cm3leon.models.clip.Encoder`: its embeddings (n, d) have unit length."""

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray: ...


def clip_score(encoder: TextImageEncoder, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
    """Cosine similarity of each image with its text, float32 ``(n,)`` in [-1, 1]; higher is better.

    It is the plain cosine, so that it also ranks candidates; CLIPScore (Hessel et al. 2021) is ``2.5 * max(cosine, 0)``. Scores are
    comparable only if they are of the same encoder.

    Raises:
        ValueError: if the numbers of images and texts differ.
    """
    if len(images) != len(texts):
        raise ValueError(f"clip_score needs a text for each image, found {len(images)} images and {len(texts)} texts")
    if not len(images):
        return np.zeros(0, dtype=np.float32)
    return np.einsum("nd,nd->n", encoder.encode_images(images), encoder.encode_texts(texts)).astype(np.float32)
