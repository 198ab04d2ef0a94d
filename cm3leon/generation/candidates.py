"""Candidates: several images for each request, generated in batches and ranked; the best are returned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from cm3leon.config.schema import DecodingConfig
from cm3leon.generation.checks import BadInputError
from cm3leon.generation.engine import MAX_ROWS, generate_images
from cm3leon.generation.image_requests import ImageRequest
from cm3leon.generation.parts import Parts
from cm3leon.generation.rerank import rank
from cm3leon.generation.results import GeneratedImage
from cm3leon.generation.sampling import Sampler
from cm3leon.sequence.grammar import Prompt
from cm3leon.utils.progress import track


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
    # 2. Generate codes and decode them to pixels, batch by batch.
    used = settings.model_dump(exclude={"max_text_tokens", "tasks"})
    candidates: list[list[GeneratedImage]] = [[] for _ in requests]
    batches = list(_batches(len(requests), count, max(1, MAX_ROWS // len(streams[0]))))
    for rows, numbers in track(batches, "generating images", unit="batches") if len(batches) > 1 else batches:
        seeds = [[seed + number for number in numbers] for _ in rows]
        codes_PCT = _codes(parts, [requests[row] for row in rows], [streams[row] for row in rows], seeds, sampler)
        images = iter(parts.decode_images(codes_PCT.reshape(-1, codes_PCT.shape[-1])))
        for row, own_seeds, own_codes in zip(rows, seeds, codes_PCT, strict=True):
            prompt, documents = requests[row].prompt, requests[row].retrieved_documents
            for own_seed, codes in zip(own_seeds, own_codes, strict=True):
                candidates[row].append(GeneratedImage(next(images), prompt, own_seed, codes, None, documents, used, task))
    # 3. Rank them, all requests together.
    ranked = rank([request.query for request in requests], candidates, parts.encoder, parts.model, settings.likelihood)
    return [images[:num_images] for images in ranked]


def _codes(
    parts: Parts, requests: Sequence[ImageRequest], streams: Sequence[Sequence[Prompt]], seeds: list[list[int]], sampler: Sampler
) -> np.ndarray:
    """Codes (requests, candidates, tokens_per_image)."""
    region = requests[0].region
    if region is None:
        return generate_images(parts.model, streams, seeds, sampler)
    # Inpainting: generate the codes of the span, and put them between those before and after it.
    span = slice(*region.span)
    generated = generate_images(parts.model, streams, seeds, sampler, region.span, region.known[None, span])
    codes = np.broadcast_to(region.known, (*generated.shape[:2], len(region.known))).copy()
    codes[..., span] = generated
    return codes


def _batches(requests: int, candidates: int, most: int) -> Iterator[tuple[list[int], list[int]]]:
    """Batches of at most ``most`` candidates: numbers of requests, and numbers of candidates of each.

    A batch holds all candidates of some requests, or some candidates of one.
    """
    if candidates >= most:
        for request in range(requests):
            for start in range(0, candidates, most):
                yield [request], list(range(start, min(start + most, candidates)))
        return
    together = most // candidates
    for start in range(0, requests, together):
        yield list(range(start, min(start + together, requests))), list(range(candidates))
