"""What a generator returns: images and texts, and how each came about."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

Neighbor = dict[str, Any]
"""A document that stood before a prompt: id, caption, licence, attribution, source, and its score to the query."""

METADATA = "cm3leon"
"""Name of the text chunk of a PNG in which :meth:`GeneratedImage.save` keeps the record."""


@dataclass
class GeneratedImage:
    """An image and how it came about; ``codes`` (tokens_per_image,), ``score`` is the CLIP score where candidates were ranked."""

    image: Image.Image
    prompt: str
    seed: int
    codes: np.ndarray
    score: float | None = None
    neighbors: list[Neighbor] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    task: str = "text_to_image"

    @property
    def record(self) -> dict[str, Any]:
        """All but the pixels and codes, for JSON."""
        return {name: getattr(self, name) for name in ("task", "prompt", "seed", "score", "settings", "neighbors")}

    def save(self, file: str | Path | IO[bytes]) -> None:
        """Write a PNG whose metadata hold task, prompt, seed, settings and the retrieved documents' ids, licences and attributions."""
        info = PngInfo()
        info.add_itxt(METADATA, json.dumps(self.record))
        self.image.save(file, format="PNG", pnginfo=info)


@dataclass(frozen=True)
class GeneratedText:
    """A text and how it came about; ``tokens`` are ids of the text tokenizer."""

    text: str
    seed: int
    tokens: list[int]
    settings: dict[str, Any]
    task: str

    def __str__(self) -> str:
        return self.text


Part = str | Image.Image | GeneratedText | GeneratedImage
"""A part of a document of texts and images: given, or generated."""


@dataclass(frozen=True)
class PairScore:
    """How likely a model finds an image and a text together, nats: the ``text`` given the image, and the ``image`` given the text."""

    text: float
    image: float
