"""The CM3 objective: causal masking (arXiv 2201.07520), with CM3leon's rule that no mask crosses ``<break>`` (arXiv 2309.02591).

The number of masked spans is Poisson. Spans are uniform, non-overlapping, inside one segment (a modality of one document); each is
replaced by ``<mask:i>`` and moved behind the body as ``<mask:i> span <eoss>``. With probability ``segment_rate`` one whole segment of
the query is masked instead: that trains captioning by infilling (the text is masked, the image stands before it) and the
mask-conditioned stream of classifier-free guidance (the text is masked, the image follows).
Where the marks of the spans make a sequence too long, it is cut in its source and never in what is to be infilled.
Loss: next-token over everything but sentinels in the body.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cm3leon.sequence.grammar import EOS, EOSS, Body, Segment, Tokens, Vocabulary

MARKS = 3
"""Tokens by which a masked span lengthens a sequence: its sentinel twice and ``<eoss>``."""

Kind = Literal["plain", "caption", "image", "spans"]
"""What a draw masks: nothing; the query's whole text; a whole image of the query; other spans."""

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Masked:
    """A finished training sequence.

    ``tokens`` (T,); ``is_target`` (T,) says which count in the loss; ``places`` (T,) is each token's place in its image, from 1, else 0. A
    mask behind which the middle of an image comes has the place before it, so that what comes is at the next place, as ever. ``spans`` are
    in coordinates of ``body``, which they were cut from; ``kind`` says what they mask.
    """

    tokens: Tokens
    is_target: np.ndarray
    places: np.ndarray
    body: Body
    spans: tuple[tuple[int, int], ...]
    kind: Kind


def draw_spans(body: Body, mean_masks: float, sentinels: int, rng: np.random.Generator, across_breaks: bool = False) -> Spans:
    """Draw Poisson(mean_masks) spans, clamped to [0, sentinels - 1], each inside one segment; sorted, non-overlapping.

    A span is drawn uniformly over the sequence and clipped to the segment it overlaps most, as in the authors' trainer.
    Spans that would overlap one already drawn are dropped, so that a short sequence gets fewer.

    Args:
        across_breaks: leave spans as they are drawn, as CM3 did.
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


def draw_segment(body: Body, text_share: float, rng: np.random.Generator) -> Segment | None:
    """One whole segment of the query (the last document): a text with probability ``text_share``, else an image; None if all are empty."""
    query = [s for s in body.segments if s.document == body.segments[-1].document and s.length]
    texts = [s for s in query if s.modality == "text"]
    images = [s for s in query if s.modality == "image"]
    pool = texts if images == [] or (texts and rng.random() < text_share) else images
    return pool[int(rng.integers(len(pool)))] if pool else None


def kind_of(body: Body, spans: Spans) -> Kind:
    """What the spans mask of the query."""
    query = [s for s in body.segments if s.document == body.segments[-1].document]
    whole = {s.modality for s in query if s.length and (s.start, s.stop) in spans}
    if "text" in whole and "image" not in whole:
        return "caption"
    return "image" if "image" in whole else "spans" if spans else "plain"


def fit(body: Body, spans: Spans, longest: int) -> tuple[Body, Spans]:
    """Cut the source until the masked sequence has at most ``longest`` tokens.

    Text outside the spans goes first, from the end of each segment, the first retrieved document's before the query's; then whole
    retrieved documents that hold no span. An image is never cut. If that is not enough, spans stay where they are, unmasked.

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
        if excess > 0 and not any(masked[s.start : s.stop].any() for s in own):
            region = slice(own[0].start, own[-1].stop + 1)  # with the break behind it
            excess -= int((~dropped[region]).sum())
            dropped[region] = True
    if excess > 0 and spans:
        return fit(body, spans[:-1], longest)
    if excess > 0:
        raise ValueError(f"a sequence of {len(body.tokens) + 1} tokens cannot be cut to {longest}: its images alone are longer")
    before = np.concatenate([[0], np.cumsum(~dropped)])
    return body.without(dropped), [(int(before[start]), int(before[stop])) for start, stop in spans]


def _excess(body: Body, spans: Spans, longest: int) -> int:
    return len(body.tokens) + 1 + MARKS * len(spans) - longest


def apply_spans(body: Body, spans: Spans, vocabulary: Vocabulary) -> Masked:
    """Replace each span by its sentinel and move it behind the body; close with ``<eos>``.

    The sequence grows by three tokens a span and one ``<eos>``.
    """
    source = np.stack([body.tokens, np.ones_like(body.tokens), body.places])  # token, whether a target, place
    pieces, tail = [], []
    position = 0
    for index, (start, stop) in enumerate(spans):
        sentinel = vocabulary.sentinel(index)
        pieces += [source[:, position:start], _mark(sentinel, is_target=False, place=_before(source, stop))]
        tail += [_mark(sentinel, place=_before(source, start)), source[:, start:stop], _mark(EOSS)]
        position = stop
    tokens, is_target, places = np.concatenate([*pieces, source[:, position:], *tail, _mark(EOS)], axis=1)
    return Masked(tokens, is_target.astype(bool), places, body, tuple(spans), kind_of(body, spans))


def _before(source: np.ndarray, position: int) -> int:
    """The place before that of a token; 0 before what is no image token."""
    return max(int(source[2, position]) - 1, 0) if position < source.shape[1] else 0


def _mark(token: int, is_target: bool = True, place: int = 0) -> np.ndarray:
    return np.array([[token], [int(is_target)], [place]])


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
    """One draw of the objective for one sequence, of at most ``longest`` tokens.

    Raises:
        ValueError: see :func:`fit`.
    """
    segment = draw_segment(body, text_share, rng) if segment_rate and rng.random() < segment_rate else None
    spans = [(segment.start, segment.stop)] if segment else draw_spans(body, mean_masks, vocabulary.sentinels, rng, across_breaks)
    if longest is not None:
        body, spans = fit(body, spans, longest)
    return apply_spans(body, spans, vocabulary)
