"""Results of a generator: images and texts, each with the record of what it was generated from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

RetrievedDocument = dict[str, Any]
"""A document of the memory bank that preceded a prompt: id, caption, licence, attribution, source, and its score to the query."""

METADATA = "cm3leon"
"""Name of the text chunk of a PNG in which :meth:`GeneratedImage.save` keeps the record."""


@dataclass
class GeneratedImage:
    """A generated image and what it was generated from.

    Attributes:
        prompt: the text that a person gave.
        seed: of this candidate's noise.
        codes: (tokens_per_image,).
        score: CLIP score of image and prompt; None if candidates were not ranked by it.
        retrieved_documents: those that preceded the prompt, in order.
        settings: decoding settings.
    """

    image: Image.Image
    prompt: str
    seed: int
    codes: np.ndarray
    score: float | None = None
    retrieved_documents: list[RetrievedDocument] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    task: str = "text_to_image"

    @property
    def record(self) -> dict[str, Any]:
        """All but pixels and codes, as JSON can hold it."""
        return {name: getattr(self, name) for name in ("task", "prompt", "seed", "score", "settings", "retrieved_documents")}

    def save(self, file: str | Path | IO[bytes]) -> None:
        """Write a PNG whose metadata hold :attr:`record`: among others the retrieved documents' ids, licenses and attributions."""
        info = PngInfo()
        info.add_itxt(METADATA, json.dumps(self.record, allow_nan=False))
        self.image.save(file, format="PNG", pnginfo=info)


@dataclass(frozen=True)
class GeneratedText:
    """A generated text and what it was generated with; ``tokens`` are ids of the text tokenizer."""

    text: str
    seed: int
    tokens: list[int]
    settings: dict[str, Any]
    task: str

    def __str__(self) -> str:
        return self.text


DocumentPart = str | Image.Image | GeneratedText | GeneratedImage
"""A text or image of a document that is continued: given, or generated."""


@dataclass(frozen=True)
class PairScore:
    """Log-likelihoods of a pair, nats: of the ``text`` given the image, and of the ``image`` given the text."""

    text: float
    image: float
