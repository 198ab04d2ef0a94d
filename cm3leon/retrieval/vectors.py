"""Vectors of documents: from embeddings of texts and images, made a chunk of rows at a time.

A document's vector is the mean of its L2-normalized text and image embeddings (paper, section 2.1), normalized again (RA-CM3, section 3.2).
The inner product of two documents, or of a query and a document, is then a cosine, and one bound excludes near-duplicates.

Shapes: n documents, d dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

TEXTS, IMAGES = "text_embeddings.npy", "image_embeddings.npy"
CHUNK = 1 << 16
"""Rows of which float32 vectors are in memory at once: 134 MB at 512 dimensions."""


def normalize(vectors: np.ndarray) -> np.ndarray:
    """float32 ``(..., d)``, L2-normalized; zero vectors stay zero."""
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def document_vectors(text: np.ndarray, image: np.ndarray) -> np.ndarray:
    """float32 ``(..., d)`` unit vectors of documents from their unit text and image vectors: ``(t + i) / |t + i|``."""
    return normalize(np.asarray(text, dtype=np.float32) + np.asarray(image, dtype=np.float32))


def chunks(count: int, size: int | None = None) -> Iterator[slice]:
    """``count`` rows in order, ``size`` or else :data:`CHUNK` at a time."""
    size = size or CHUNK
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def document_chunks(text: np.ndarray, image: np.ndarray) -> Iterator[np.ndarray]:
    """:func:`document_vectors` of all rows, :data:`CHUNK` at a time."""
    for rows in chunks(len(text)):
        yield document_vectors(text[rows], image[rows])


def create_embeddings(directory: Path, count: int, dimensions: int) -> tuple[np.memmap, np.memmap]:
    """Text and image embeddings ``(count, dimensions)`` to be filled, float16, memory-mapped from their files in ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    shape = (count, dimensions)
    text, image = (np.lib.format.open_memmap(directory / name, mode="w+", dtype=np.float16, shape=shape) for name in (TEXTS, IMAGES))
    return text, image


def open_embeddings(directory: Path) -> tuple[np.memmap, np.memmap]:
    """The embeddings that another process has created, to be filled too."""
    text, image = (np.lib.format.open_memmap(directory / name, mode="r+") for name in (TEXTS, IMAGES))
    return text, image
