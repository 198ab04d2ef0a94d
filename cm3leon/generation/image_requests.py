"""Requests for images: the prompts that precede an image, and the segments by which its candidates are ranked.

:func:`image_request` lays out a task's texts and images as in training, once for each stream of guidance. :func:`inpainting_request` masks
a box of an image, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from cm3leon.generation.checks import BadInputError, free_tokens
from cm3leon.generation.parts import Parts
from cm3leon.generation.prompts import image_prompt, infill_prompt
from cm3leon.generation.results import RetrievedDocument
from cm3leon.sequence.grammar import Prompt
from cm3leon.sequence.tasks import TASKS, Box, Fields, SegmentTokens, lay_out


@dataclass(frozen=True)
class Query:
    """The segments that precede an image, without retrieved documents.

    Attributes:
        likelihood_segments: those whose log-likelihood, given the image, ranks candidates; empty: it does not.
        describes_image: the prompt describes the image, so that CLIP can compare the two; an instruction of editing does not.
    """

    segments: list[SegmentTokens]
    likelihood_segments: tuple[int, ...] = ()
    describes_image: bool = True


@dataclass(frozen=True)
class Region:
    """A region of an image to be inpainted.

    Attributes:
        codes: (tokens_per_image,), of the image.
        inside: raster indices of the codes to generate.
        continuation: what follows the prompts; its unknown tokens are those codes.
    """

    codes: np.ndarray
    inside: np.ndarray
    continuation: Prompt


@dataclass(frozen=True)
class ImageRequest:
    """One image to generate.

    Attributes:
        prompt: the text that a person gave.
        streams: the prompt of each stream of guidance, the conditional one first.
        retrieved_documents: those that precede the query in every stream.
        region: the region to inpaint; None: the whole image is generated.
    """

    prompt: str
    query: Query
    streams: list[Prompt]
    retrieved_documents: list[RetrievedDocument] = field(default_factory=list)
    region: Region | None = None


def image_request(
    parts: Parts,
    task: str,
    prompt: str,
    values: Fields,
    images: Mapping[str, np.ndarray] | None = None,
    documents: Sequence[RetrievedDocument] = (),
) -> ImageRequest:
    """The request that a task makes of its texts and images.

    Retrieved documents that do not fit in the context with the prompt and the image are left out, the least relevant first.

    Args:
        values: texts of the fields of the task's template (``cm3leon.sequence.tasks``).
        images: codes of the template's other images by field name (``source``, ``condition``).
    """
    segments = query_segments(parts, task, values, images or {})
    documents = list(documents)
    streams = guidance_streams(parts, task, segments, documents)
    while documents and free_tokens(parts.model, streams) < parts.model.vocabulary.tokens_per_image:
        documents.pop()
        streams = guidance_streams(parts, task, segments, documents)
    query = Query(segments, TASKS[task].cfg_dropout[0], describes_image=task != "edit")
    return ImageRequest(prompt, query, streams, documents)


def query_segments(parts: Parts, task: str, values: Fields, images: Mapping[str, np.ndarray]) -> list[SegmentTokens]:
    """The segments before the image that a task generates, by its first template."""
    return lay_out(TASKS[task].templates[0], [values], images, parts.model.vocabulary, parts.text_tokenizer)[0]


def guidance_streams(
    parts: Parts, task: str, segments: Sequence[SegmentTokens], documents: Sequence[RetrievedDocument] = ()
) -> list[Prompt]:
    """The streams of guidance: the conditional one, then one for each group of segments that conditioning dropout masks in training.

    All keep the retrieved documents (arXiv 2309.02591, section 3.1). For editing: image and instruction, image, neither.
    """
    vocabulary = parts.model.vocabulary
    retrieved = [] if parts.memory is None else [parts.memory.segments(document, vocabulary) for document in documents]
    return [image_prompt(segments, retrieved, vocabulary, frozenset(masked)) for masked in ((), *TASKS[task].cfg_dropout)]


def inpainting_request(parts: Parts, image: Image.Image, codes: np.ndarray, box: Box, caption: str) -> ImageRequest:
    """The request to generate again what a box of an image shows, as spans that CM3 masked. The other stream of guidance has no text.

    Args:
        codes: (tokens_per_image,), of the image.
        box: pixels of the image, inside it; grows to whole patches of the image tokenizer.

    Raises:
        BadInputError: if the box is outside the square that the model sees.
    """
    region = _region(parts, image, box)
    segments = query_segments(parts, "text_to_image", {"caption": caption}, {})
    query = Query(segments, TASKS["text_to_image"].cfg_dropout[0])
    texts = segments[0][1], segments[0][1][:0]
    streams, continuations = zip(*(infill_prompt(text, codes, region, parts.model.vocabulary) for text in texts), strict=True)
    return ImageRequest(caption, query, list(streams), region=Region(codes, np.flatnonzero(region), continuations[0]))


def _region(parts: Parts, image: Image.Image, box: Box) -> np.ndarray:
    """The codes whose patches a box touches, once the image is fitted to the tokenizer's square; (tokens_per_image,), boolean."""
    side = round(parts.model.vocabulary.tokens_per_image**0.5)
    shorter = min(image.size)
    columns = _touched(box[0], box[2], image.width, shorter, parts.image_size, side)
    rows = _touched(box[1], box[3], image.height, shorter, parts.image_size, side)
    touched = np.zeros((side, side), dtype=bool)
    touched[rows, columns] = True
    if not touched.any():
        raise BadInputError(f"the box {box} is outside the square that the model sees of an image of {image.width} x {image.height} pixels")
    return touched.ravel()


def _touched(start: float, end: float, length: int, shorter: int, size: int, side: int) -> slice:
    """The columns or rows of patches that a box touches, of ``side``.

    Args:
        start, end: of the box along the image's width or height, pixels.
        length, shorter: that side of the image and its shorter one, pixels.
        size: of the square to which :func:`~cm3leon.data.images.fit_square` resizes and crops the image, pixels.
    """
    fitted = max(size, round(length * (size / shorter)))
    cropped = (fitted - size) // 2
    # The product first: where an edge is one of a patch, the quotient is exact.
    first, last = ((edge * fitted / length - cropped) * side / size for edge in (start, end))
    return slice(min(max(math.floor(first), 0), side), min(max(math.ceil(last), 0), side))
