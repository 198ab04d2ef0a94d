"""Ranking candidates: by the CLIP encoder, and by how likely the decoder itself is to read from an image what was asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cm3leon.generation.engine import log_likelihoods
from cm3leon.generation.prompts import Query, reading_pair
from cm3leon.generation.results import GeneratedImage
from cm3leon.models.decoder import Decoder
from cm3leon.sequence.grammar import Prompt

if TYPE_CHECKING:
    from cm3leon.models.clip import Encoder

ROWS = 128
"""Sequences scored together."""


def rank(
    queries: Sequence[Query], drawn: Sequence[list[GeneratedImage]], encoder: Encoder | None, model: Decoder, likelihood: float
) -> list[list[GeneratedImage]]:
    """Each list sorted, best first; images of queries that describe them get their CLIP score, all encoded together.

    Args:
        queries: what was asked, one for each list. Those that do not describe their image (an instruction) are ranked by likelihood alone.
        likelihood: weight, beside the CLIP score, of how likely what was asked is, read from the image, nats.
    """
    flat = [(query, image) for query, images in zip(queries, drawn, strict=True) for image in images]
    keys = np.zeros(len(flat))
    described = [row for row, (query, _) in enumerate(flat) if query.describes and encoder is not None]
    if described and encoder is not None:
        vectors = encoder.encode_images([flat[row][1].image for row in described])
        prompts = list(dict.fromkeys(flat[row][1].prompt for row in described))
        texts = dict(zip(prompts, encoder.encode_texts(prompts), strict=True))
        for row, vector in zip(described, vectors, strict=True):
            generated = flat[row][1]
            keys[row] = generated.score = float(vector @ texts[generated.prompt])
    read = [row for row, (query, _) in enumerate(flat) if query.hidden and (likelihood or not query.describes)]
    if read:
        weights = [likelihood if flat[row][0].describes else 1.0 for row in read]
        keys[read] += np.array(weights) * read_likelihoods(model, [flat[row][0] for row in read], [flat[row][1].codes for row in read])
    order = {id(image): -key for (_, image), key in zip(flat, keys, strict=True)}
    return [sorted(images, key=lambda image: order[id(image)]) for images in drawn]


def read_likelihoods(model: Decoder, queries: Sequence[Query], codes: Sequence[np.ndarray]) -> np.ndarray:
    """How likely the model is to read from each image what was asked, and nothing more, nats; of what is too long for the context, of its
    beginning."""
    found: list[float] = []
    for start in range(0, len(codes), ROWS):
        part = slice(start, start + ROWS)
        pairs = [
            reading_pair(query.segments, row, query.hidden, model.vocabulary) for query, row in zip(queries[part], codes[part], strict=True)
        ]
        prompts = [prompt for prompt, _ in pairs]
        rooms = [model.spec.context + 1 - len(prompt) for prompt in prompts]
        wanted = [Prompt(tail.tokens[:room], tail.image_positions[:room]) for (_, tail), room in zip(pairs, rooms, strict=True)]
        found += [float(score.sum()) for score in log_likelihoods(model, prompts, wanted)]
    return np.array(found)
