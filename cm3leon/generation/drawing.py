"""Drawing the candidates of several images asked for, in batches, and choosing the best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from cm3leon.config.schema import DecodingConfig
from cm3leon.generation.engine import generate_images
from cm3leon.generation.parts import BadInputError, Parts
from cm3leon.generation.prompts import Query
from cm3leon.generation.rerank import rank
from cm3leon.generation.results import GeneratedImage, Neighbor
from cm3leon.generation.sampling import Sampler
from cm3leon.sequence.grammar import Prompt
from cm3leon.utils.progress import track

ROWS = 128
"""Sequences decoded together."""


@dataclass(frozen=True)
class Drawing:
    """One image asked for: the prompt shown, what is asked, what its streams of guidance read, and the documents before it."""

    prompt: str
    query: Query
    streams: list[Prompt]
    neighbors: list[Neighbor] = field(default_factory=list)


@dataclass(frozen=True)
class Gap:
    """A part of an image to be drawn: ``span`` of its codes; ``codes`` (tokens_per_image,), those given, -1 where one is to be drawn."""

    span: tuple[int, int]
    codes: np.ndarray


def draw(
    parts: Parts, task: str, drawings: Sequence[Drawing], num_images: int, seed: int, settings: DecodingConfig, gap: Gap | None = None
) -> list[list[GeneratedImage]]:
    """The ``num_images`` best of ``num_images * candidates`` for each drawing, best first; candidate ``n`` has the seed ``seed + n``.

    Raises:
        BadInputError: if there is no number of images, or nothing to rank candidates with.
        PromptTooLongError: if a prompt and an image do not fit in the context.
    """
    if num_images < 1:
        raise BadInputError(f"num_images must be at least 1, found {num_images}")
    draws, sampler = num_images * settings.candidates, Sampler(settings)
    if draws > num_images and parts.encoder is None and any(drawing.query.describes for drawing in drawings):
        raise BadInputError("candidates > 1 needs a bundle with an encoder to rank them")
    streams = [drawing.streams[: sampler.streams_of(len(drawing.streams))] for drawing in drawings]
    used = settings.model_dump(exclude={"max_text_tokens", "tasks"})
    drawn: list[list[GeneratedImage]] = [[] for _ in drawings]
    jobs = list(_jobs(len(drawings), draws, max(1, ROWS // len(streams[0])))) if drawings else []
    for rows, numbers in track(jobs, "drawing", unit="batches") if len(jobs) > 1 else jobs:
        seeds = [[seed + number for number in numbers] for _ in rows]
        codes = _codes(parts, [streams[row] for row in rows], seeds, sampler, gap)
        pictures = iter(parts.decode(codes.reshape(-1, codes.shape[-1])))
        for row, own_seeds, own_codes in zip(rows, seeds, codes, strict=True):
            asked = drawings[row]
            drawn[row] += [
                GeneratedImage(next(pictures), asked.prompt, own_seed, found, None, asked.neighbors, used, task)
                for own_seed, found in zip(own_seeds, own_codes, strict=True)
            ]
    drawn = rank([drawing.query for drawing in drawings], drawn, parts.encoder, parts.model, settings.likelihood)
    return [images[:num_images] for images in drawn]


def _codes(parts: Parts, streams: list[list[Prompt]], seeds: list[list[int]], sampler: Sampler, gap: Gap | None) -> np.ndarray:
    if gap is None:
        return generate_images(parts.model, streams, seeds, sampler)
    known = np.broadcast_to(gap.codes[slice(*gap.span)], (len(streams), gap.span[1] - gap.span[0])).copy()
    drawn = generate_images(parts.model, streams, seeds, sampler, gap.span, known)
    codes = np.broadcast_to(gap.codes, (*drawn.shape[:2], len(gap.codes))).copy()
    codes[..., slice(*gap.span)] = drawn
    return codes


def _jobs(rows: int, draws: int, most: int) -> Iterator[tuple[list[int], list[int]]]:
    """Rows, and numbers of their candidates, that are drawn together, at most ``most`` in all: whole rows, or part of one's candidates."""
    if draws >= most:
        yield from (([row], list(range(start, min(start + most, draws)))) for row in range(rows) for start in range(0, draws, most))
        return
    together = most // draws
    yield from ((list(range(start, min(start + together, rows))), list(range(draws))) for start in range(0, rows, together))
