"""The CM3 objective: causal masking (arXiv 2201.07520), with CM3leon's rule that no mask crosses ``<break>`` (arXiv 2309.02591).

The number of masked spans is Poisson distributed. Spans are uniform, do not overlap and lie in one segment (one modality of one
document); each is replaced by ``<mask:i>`` and moved to the end as ``<mask:i> span <eoss>``. With probability ``segment_rate`` one whole
segment of the query is masked instead. That trains captioning by infilling (the text is masked and generated after the image) and the
unconditional stream of classifier-free guidance (the text is masked, the image follows).
A sequence that the added tokens make too long loses tokens of its source, never of the spans to be infilled.
The loss is next-token prediction on everything but the sentinels in the body.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cm3leon.sequence.grammar import EOS, EOSS, Body, Segment, Tokens, Vocabulary

TOKENS_PER_SPAN = 3
"""Tokens that a masked span adds to a sequence: its sentinel twice and ``<eoss>``."""

Kind = Literal["plain", "caption", "image", "spans"]
"""The part of a sample that is masked: none; the query's whole text; a whole image of the query; other spans."""

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Masked:
    """A finished training sequence.

    Attributes:
        tokens: token ids (T,).
        is_target: boolean (T,), which tokens count in the loss.
        image_positions: (T,), raster index of each token in its image, from 1; 0 for tokens of no image. A sentinel that is followed by the
            middle of an image has the index before it, so that here too the next token's index is one more.
        body: the sequence before masking, to which ``spans`` refer.
        kind: what the spans mask.
    """

    tokens: Tokens
    is_target: np.ndarray
    image_positions: np.ndarray
    body: Body
    spans: tuple[tuple[int, int], ...]
    kind: Kind

    @property
    def tail(self) -> int:
        """Where the source ends: the position at which the first span follows, or ``<eos>`` if nothing is masked."""
        return len(self.body.tokens) - sum(stop - start - 1 for start, stop in self.spans)


def sample_spans(body: Body, mean_masks: float, sentinels: int, rng: np.random.Generator, across_breaks: bool = False) -> Spans:
    """Sample Poisson(mean_masks) spans, clamped to [0, sentinels - 1], each inside one segment; sorted, without overlaps.

    A span is sampled uniformly over the sequence and clipped to the segment that it overlaps most, as in the authors' trainer.
    One that would overlap an earlier span is dropped, so that short sequences get fewer.

    Args:
        across_breaks: do not clip spans to a segment, as in CM3.
    """
    count = min(int(rng.poisson(mean_masks)), max(sentinels - 1, 0)) if body.segments else 0
    spans: Spans = []
    for _ in range(count):
        low, high = sorted(int(x) for x in rng.integers(1, len(body.tokens) + 1, size=2))
        if across_breaks:
            if low < high and all(high <= start or low >= stop for start, stop in spans):
                spans.append((low, high))
            continue
        overlaps = [min(high, s.stop) - max(low, s.start) for s in body.segments]
        best = int(np.argmax(overlaps))
        if overlaps[best] <= 0:
            continue
        segment = body.segments[best]
        span = (max(low, segment.start), min(high, segment.stop))
        if all(span[1] <= start or span[0] >= stop for start, stop in spans):
            spans.append(span)
    return sorted(spans)


def sample_segment(body: Body, text_share: float, rng: np.random.Generator) -> Segment | None:
    """One whole segment of the query (the last document): text with probability ``text_share``, else an image; None if all are empty."""
    query = [s for s in body.segments if s.document == body.segments[-1].document and s.length]
    texts = [s for s in query if s.modality == "text"]
    images = [s for s in query if s.modality == "image"]
    pool = texts if images == [] or (texts and rng.random() < text_share) else images
    return pool[int(rng.integers(len(pool)))] if pool else None


def sample_region(side: int, rng: np.random.Generator) -> np.ndarray:
    """A random box in an image of ``side`` x ``side`` tokens, boolean (side * side,) in raster order.

    The box is a quarter to three quarters as wide, and as high, as the image.
    """
    least, most = max(1, side // 4), max(1, 3 * side // 4)
    height, width = (int(size) for size in rng.integers(least, most + 1, size=2))
    top, left = int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1))
    region = np.zeros((side, side), dtype=bool)
    region[top : top + height, left : left + width] = True
    return region.ravel()


def region_spans(region: np.ndarray, most: int) -> Spans:
    """The spans of an image that mask a region of it: one for each of its rows, so that what lies beside it stays to be seen.

    Rows that follow each other in raster order, as those of a region as wide as the image do, are one span. If there are more than
    ``most``, the last span holds the rest of the region and what lies between.

    Args:
        region: boolean (tokens_per_image,), in raster order.
    """
    edges = np.flatnonzero(np.diff(region.astype(np.int8), prepend=0, append=0))
    spans = [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
    return spans if len(spans) <= most else [*spans[: most - 1], (spans[most - 1][0], spans[-1][1])]


def kind_of(body: Body, spans: Spans) -> Kind:
    """Classify spans by the part of the query, the last document, that they mask."""
    query = [s for s in body.segments if s.document == body.segments[-1].document]
    whole = {s.modality for s in query if s.length and (s.start, s.stop) in spans}
    if "text" in whole and "image" not in whole:
        return "caption"
    return "image" if "image" in whole else "spans" if spans else "plain"


def fit(body: Body, spans: Spans, longest: int) -> tuple[Body, Spans]:
    """Shorten the source until the masked sequence has at most ``longest`` tokens.

    In this order: (1) text outside the spans, from the end of each segment, the first retrieved document's before the query's;
    (2) if that is not enough, the first retrieved document that holds no span, and what is left starts over, whole; (3) the last span is
    left unmasked, and (1) and (2) start over. Images and spans are never cut.

    Raises:
        ValueError: if the unmasked body cannot be made to fit.
    """
    spans = list(spans)
    excess = _excess(body, spans, longest)
    if excess <= 0:
        return body, spans
    masked = np.zeros(len(body.tokens), dtype=bool)
    for start, stop in spans:
        masked[start:stop] = True
    dropped = np.zeros(len(body.tokens), dtype=bool)
    for segment in body.segments:
        if segment.modality == "text" and excess > 0:
            free = np.flatnonzero(~masked[segment.start : segment.stop])[::-1][:excess] + segment.start
            dropped[free] = True
            excess -= len(free)
    for number in range(body.segments[-1].document if body.segments else 0):
        own = [s for s in body.segments if s.document == number]
        kept = any(s.length for s in own)  # not dropped yet
        if excess > 0 and kept and not any(masked[s.start : s.stop].any() for s in own):
            dropped[:] = False
            dropped[own[0].start : own[-1].stop + 1] = True  # with the <break> that follows
            return fit(*_without(body, spans, dropped), longest)
    if excess > 0 and spans:
        return fit(body, spans[:-1], longest)
    if excess > 0:
        raise ValueError(f"a sequence of {len(body.tokens) + 1} tokens cannot be cut to {longest}: its images alone are longer")
    return _without(body, spans, dropped)


def _without(body: Body, spans: Spans, dropped: np.ndarray) -> tuple[Body, Spans]:
    """A body without some tokens, none of them in a span, and its spans."""
    before = np.concatenate([[0], np.cumsum(~dropped)])
    return body.without(dropped), [(int(before[start]), int(before[stop])) for start, stop in spans]


def _excess(body: Body, spans: Spans, longest: int) -> int:
    return len(body.tokens) + 1 + TOKENS_PER_SPAN * len(spans) - longest


def apply_spans(body: Body, spans: Spans, vocabulary: Vocabulary) -> Masked:
    """Replace each span by its sentinel, move it to the end, and close with ``<eos>``.

    The sequence grows by :data:`TOKENS_PER_SPAN` tokens per span and one ``<eos>``.
    """
    source = np.stack([body.tokens, np.ones_like(body.tokens), body.image_positions])  # rows: token, is_target, image position
    pieces, tail = [], []
    position = 0
    for index, (start, stop) in enumerate(spans):
        sentinel = vocabulary.sentinel(index)
        pieces += [source[:, position:start], _special(sentinel, is_target=False, image_position=_index_before(source, stop))]
        tail += [_special(sentinel, image_position=_index_before(source, start)), source[:, start:stop], _special(EOSS)]
        position = stop
    tokens, is_target, image_positions = np.concatenate([*pieces, source[:, position:], *tail, _special(EOS)], axis=1)
    return Masked(tokens, is_target.astype(bool), image_positions, body, tuple(spans), kind_of(body, spans))


def _index_before(source: np.ndarray, position: int) -> int:
    """The image position of the token at ``position`` less one, so that the token after a sentinel continues it; 0 where it has none."""
    return max(int(source[2, position]) - 1, 0) if position < source.shape[1] else 0


def _special(token: int, is_target: bool = True, image_position: int = 0) -> np.ndarray:
    return np.array([[token], [int(is_target)], [image_position]])


def mask(
    body: Body,
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    *,
    mean_masks: float = 1.0,
    segment_rate: float = 0.0,
    text_share: float = 0.5,
    across_breaks: bool = False,
    longest: int | None = None,
) -> Masked:
    """Apply the objective to one sequence: sample what is masked, and return at most ``longest`` tokens.

    Raises:
        ValueError: see :func:`fit`.
    """
    segment = sample_segment(body, text_share, rng) if segment_rate and rng.random() < segment_rate else None
    spans = [(segment.start, segment.stop)] if segment else sample_spans(body, mean_masks, vocabulary.sentinels, rng, across_breaks)
    if longest is not None:
        body, spans = fit(body, spans, longest)
    return apply_spans(body, spans, vocabulary)
