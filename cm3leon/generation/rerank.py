"""Ranking candidates: by CLIP score, and by the decoder's own log-likelihood of the image and of the prompt as its caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cm3leon.generation.checks import free_tokens
from cm3leon.generation.engine import MAX_ROWS, log_likelihoods
from cm3leon.generation.image_requests import Query
from cm3leon.generation.prompts import likelihood_pair
from cm3leon.generation.results import GeneratedImage
from cm3leon.models.decoder import Decoder
from cm3leon.sequence.grammar import Prompt

if TYPE_CHECKING:
    from cm3leon.models.clip import Encoder


def ranking_scores(
    queries: Sequence[Query], candidates: Sequence[list[GeneratedImage]], encoder: Encoder | None, model: Decoder, likelihood: float
) -> list[np.ndarray]:
    """The ranking score of each candidate, in lists like theirs, higher is better; images get their CLIP score.

    The score of an image x for a prompt t is ``cos(CLIP(x), CLIP(t)) + likelihood * (log p(x) + log p(t | x))``. The paper ranks by CLIP
    alone (arXiv 2309.02591); the logarithms are the decoder's, nats. ``p(x) p(t | x)`` is proportional to ``p(x | t)``, by which the
    image was sampled, as a noisy channel sees it: ``p(x)`` finds images that are unlike all of training, such as those with an object too
    many, which neither CLIP nor the caption sees. An instruction of editing does not describe the image, so that CLIP cannot compare
    them: there the score is ``log p(t | x, source)`` alone.

    Args:
        queries: one for each list.
        likelihood: weight of the log-likelihood.
    """
    flat = [(query, image) for query, images in zip(queries, candidates, strict=True) for image in images]
    scores = np.zeros(len(flat))
    # 1. CLIP scores, all images encoded together and each prompt once.
    described = [row for row, (query, _) in enumerate(flat) if query.describes_image and encoder is not None]
    if described and encoder is not None:
        vectors = encoder.encode_images([flat[row][1].image for row in described])
        prompts = list(dict.fromkeys(flat[row][1].prompt for row in described))
        texts = dict(zip(prompts, encoder.encode_texts(prompts), strict=True))
        for row, vector in zip(described, vectors, strict=True):
            image = flat[row][1]
            scores[row] = image.score = float(vector @ texts[image.prompt])
    # 2. Log-likelihoods, where they count.
    for rows, weight, measure in (
        ([row for row, (query, _) in enumerate(flat) if query.describes_image], likelihood, joint_log_likelihoods),
        ([row for row, (query, _) in enumerate(flat) if not query.describes_image], 1.0, caption_log_likelihoods),
    ):
        read = [row for row in rows if flat[row][0].likelihood_segments and weight]
        if read:
            scores[read] += weight * measure(model, [flat[row][0] for row in read], [flat[row][1].codes for row in read])
    return np.split(scores, np.cumsum([len(images) for images in candidates])[:-1])


def caption_log_likelihoods(model: Decoder, queries: Sequence[Query], codes: Sequence[np.ndarray]) -> np.ndarray:
    """The log-likelihood of each query's ``likelihood_segments`` and of their ends, given its image; nats, (queries,).

    A text that is too long for the context is cut: its beginning is scored.

    Args:
        codes: of the queries' images.
    """
    return _log_likelihoods(model, queries, codes, joint=False)


def joint_log_likelihoods(model: Decoder, queries: Sequence[Query], codes: Sequence[np.ndarray]) -> np.ndarray:
    """The log-likelihood of each query's image, and of its ``likelihood_segments`` given the image; see :func:`caption_log_likelihoods`."""
    return _log_likelihoods(model, queries, codes, joint=True)


def _log_likelihoods(model: Decoder, queries: Sequence[Query], codes: Sequence[np.ndarray], joint: bool) -> np.ndarray:
    found: list[float] = []
    for start in range(0, len(codes), MAX_ROWS):
        rows = range(start, min(start + MAX_ROWS, len(codes)))
        pairs = [
            likelihood_pair(queries[row].segments, codes[row], queries[row].likelihood_segments, model.vocabulary, joint) for row in rows
        ]
        prompts = [prompt for prompt, _ in pairs]
        # The last token is only predicted, never read, so that a continuation may be longer by one than the free tokens.
        rooms = [free_tokens(model, [prompt]) + 1 for prompt in prompts]
        continuations = [Prompt(tail.tokens[:room], tail.image_positions[:room]) for (_, tail), room in zip(pairs, rooms, strict=True)]
        found += [float(tokens.sum()) for tokens in log_likelihoods(model, prompts, continuations)]
    return np.array(found)
