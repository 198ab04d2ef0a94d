"""Candidates: several images for each request, generated and ranked a batch at a time; only the best are kept and returned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from cm3leon.config.schema import DecodingConfig
from cm3leon.generation.checks import BadInputError
from cm3leon.generation.engine import generate_images
from cm3leon.generation.image_requests import ImageRequest
from cm3leon.generation.parts import Parts
from cm3leon.generation.rerank import ranking_scores
from cm3leon.generation.results import GeneratedImage
from cm3leon.generation.rows import batch_shape, sequence_bytes
from cm3leon.generation.sampling import Sampler
from cm3leon.sequence.grammar import Prompt
from cm3leon.utils.memory import free_memory
from cm3leon.utils.progress import track

Scored = tuple[float, GeneratedImage]
"""A candidate with its ranking score."""


def best_candidates(
    parts: Parts, task: str, requests: Sequence[ImageRequest], num_images: int, seed: int, settings: DecodingConfig
) -> list[list[GeneratedImage]]:
    """The ``num_images`` best of ``num_images * candidates`` images for each request, best first.

    Candidate ``n`` of each request has the seed ``seed + n``. Requests have equally many streams; one that inpaints comes alone.

    Raises:
        BadInputError: if ``num_images`` is below 1, or there is nothing to rank candidates with.
        PromptTooLongError: if a prompt and an image do not fit in the context.
    """
    # 1. Checks, and the streams that the settings need.
    if num_images < 1:
        raise BadInputError(f"num_images must be at least 1, found {num_images}")
    count = num_images * settings.candidates
    if count > num_images and parts.encoder is None and any(request.query.describes_image for request in requests):
        raise BadInputError("candidates > 1 needs a bundle with an encoder to rank them")
    if not requests:
        return []
    sampler = Sampler(settings)
    streams = [request.streams[: sampler.streams_needed(len(request.streams))] for request in requests]
    # 2. As many candidates at once as fit in memory.
    tokens = max(len(prompt) for own in streams for prompt in own), _new_tokens(parts, requests[0])
    together = batch_shape(sequence_bytes(parts.model, *tokens), len(streams[0]), count, free_memory(parts.model.device))
    batches = list(_batches(len(requests), count, *together))
    best: list[list[Scored]] = [[] for _ in requests]
    for rows, numbers in track(batches, "generating images", unit="batches") if len(batches) > 1 else batches:
        # 3. Generate and rank a batch. Of each request the best so far are kept; the other pictures are gone before the next batch.
        seeds = [seed + number for number in numbers]
        own = sampler.of_batch(numbers, count)
        scored = _scored(parts, task, [requests[row] for row in rows], [streams[row] for row in rows], seeds, own, settings)
        for row, kept in zip(rows, [_best(best[row] + scored.pop(0), num_images) for row in rows], strict=True):
            best[row] = kept
    return [[image for _, image in own] for own in best]


def _new_tokens(parts: Parts, request: ImageRequest) -> int:
    return len(request.region.continuation) if request.region else parts.model.vocabulary.tokens_per_image


def _best(scored: list[Scored], count: int) -> list[Scored]:
    """The best, in order. The sort is stable: of equal scores the first candidate stays first."""
    return sorted(scored, key=lambda pair: -pair[0])[:count]


def _scored(
    parts: Parts,
    task: str,
    requests: Sequence[ImageRequest],
    streams: Sequence[Sequence[Prompt]],
    seeds: list[int],
    sampler: Sampler,
    settings: DecodingConfig,
) -> list[list[Scored]]:
    """A candidate of each seed for each request, decoded to pixels, with their ranking scores."""
    codes_PCT = _codes(parts, requests, streams, [seeds] * len(requests), sampler)
    images = iter(parts.decode_images(codes_PCT.reshape(-1, codes_PCT.shape[-1])))
    used = settings.model_dump(exclude={"max_text_tokens", "tasks"})
    candidates = [
        [
            GeneratedImage(next(images), request.prompt, seed, codes.copy(), None, request.retrieved_documents, used, task)
            for seed, codes in zip(seeds, own_codes, strict=True)
        ]
        for request, own_codes in zip(requests, codes_PCT, strict=True)
    ]
    scores = ranking_scores([request.query for request in requests], candidates, parts.encoder, parts.model, settings.likelihood)
    return [list(zip(own_scores.tolist(), own, strict=True)) for own_scores, own in zip(scores, candidates, strict=True)]


def _codes(
    parts: Parts, requests: Sequence[ImageRequest], streams: Sequence[Sequence[Prompt]], seeds: list[list[int]], sampler: Sampler
) -> np.ndarray:
    """Codes (requests, candidates, tokens_per_image)."""
    region = requests[0].region
    if region is None:
        return generate_images(parts.model, streams, seeds, sampler)
    # Inpainting: generate the codes of the region, and put them among those of the image.
    generated = generate_images(parts.model, streams, seeds, sampler, region.continuation)
    codes = np.broadcast_to(region.codes, (*generated.shape[:2], len(region.codes))).astype(generated.dtype)
    codes[..., region.inside] = generated
    return codes


def _batches(requests: int, candidates: int, requests_together: int, candidates_together: int) -> Iterator[tuple[list[int], list[int]]]:
    """Batches: numbers of requests, and numbers of candidates of each."""
    for first in range(0, requests, requests_together):
        for start in range(0, candidates, candidates_together):
            rows = range(first, min(first + requests_together, requests))
            yield list(rows), list(range(start, min(start + candidates_together, candidates)))
