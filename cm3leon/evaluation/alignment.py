"""CLIP score: the cosine similarity of image and text embeddings (Hessel et al. 2021, without their scaling)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


class ImageEncoder(Protocol):
    """A network that embeds images: features (n, d)."""

    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray: ...


class TextImageEncoder(ImageEncoder, Protocol):
    """The part of :class:`cm3leon.models.clip.Encoder` that is needed here."""

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray: ...


def clip_score(encoder: TextImageEncoder, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
    """Cosine similarity of each image and its text, float32 ``(n,)`` in [-1, 1]; higher is better.

    It is the plain cosine, neither clipped at 0 nor scaled (CLIPScore by Hessel et al. 2021 is ``2.5 * max(cosine, 0)``),
    so that it also ranks candidates. Scores of different encoders cannot be compared.

    Raises:
        ValueError: if there are not as many texts as images.
    """
    if len(images) != len(texts):
        raise ValueError(f"clip_score pairs images with texts: {len(images)} images, {len(texts)} texts")
    if not len(images):
        return np.zeros(0, dtype=np.float32)
    return np.einsum("nd,nd->n", encoder.encode_images(images), encoder.encode_texts(texts)).astype(np.float32)
