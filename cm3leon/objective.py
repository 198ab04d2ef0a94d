"""The CM3 objective: causal masking (arXiv 2201.07520), with CM3leon's rule that no mask crosses ``<break>`` (arXiv 2309.02591).

The number of masked spans is Poisson. Spans are uniform, non-overlapping, inside one segment (a modality of one document); each is
replaced by ``<mask:i>`` and moved behind the body as ``<mask:i> span <eoss>``. With probability ``segment_rate`` one whole segment of
the query is masked instead: that trains captioning by infilling (the text is masked, the image stands before it) and the
mask-conditioned stream of classifier-free guidance (the text is masked, the image follows).
Loss: next-token over everything but sentinels in the body.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cm3leon.documents import EOS, EOSS, Body, Segment, Tokens, Vocabulary


@dataclass(frozen=True)
class Masked:
    """A finished training sequence.

    ``tokens`` (T,); ``is_target`` (T,) says which count in the loss; ``places`` (T,) is each token's place in its image, from 1, else 0;
    ``spans`` are in body coordinates.
    """

    tokens: Tokens
    is_target: np.ndarray
    places: np.ndarray
    spans: tuple[tuple[int, int], ...]


def draw_spans(body: Body, mean_masks: float, sentinels: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Draw Poisson(mean_masks) spans, clamped to [0, sentinels - 1], each inside one segment; sorted, non-overlapping.

    A span is drawn uniformly over the sequence and clipped to the segment it overlaps most, as in the authors' trainer.
    Spans that would overlap one already drawn are dropped, so that a short sequence gets fewer.
    """
    count = min(int(rng.poisson(mean_masks)), max(sentinels - 1, 0))
    spans: list[tuple[int, int]] = []
    for _ in range(count):
        low, high = sorted(int(x) for x in rng.integers(1, len(body.tokens) + 1, size=2))
        overlaps = [min(high, s.stop) - max(low, s.start) for s in body.segments]
        best = int(np.argmax(overlaps))
        if overlaps[best] <= 0:
            continue
        segment = body.segments[best]
        span = (max(low, segment.start), min(high, segment.stop))
        if all(span[1] <= start or span[0] >= stop for start, stop in spans):
            spans.append(span)
    return sorted(spans)


def draw_segment(body: Body, text_share: float, rng: np.random.Generator) -> Segment:
    """One whole segment of the query (the last document): a text with probability ``text_share``, else an image."""
    query = [s for s in body.segments if s.document == body.segments[-1].document and s.length]
    texts = [s for s in query if s.modality == "text"]
    images = [s for s in query if s.modality == "image"]
    pool = texts if images == [] or (texts and rng.random() < text_share) else images
    return pool[int(rng.integers(len(pool)))]


def apply_spans(body: Body, spans: list[tuple[int, int]], vocabulary: Vocabulary) -> Masked:
    """Replace each span by its sentinel and move it behind the body; close with ``<eos>``.

    The sequence grows by three tokens a span and one ``<eos>``.
    """
    source = np.stack([body.tokens, np.ones_like(body.tokens), body.places])  # token, whether a target, place
    pieces, tail = [], []
    position = 0
    for index, (start, stop) in enumerate(spans):
        sentinel = vocabulary.sentinel(index)
        pieces += [source[:, position:start], _mark(sentinel, is_target=False)]
        tail += [_mark(sentinel), source[:, start:stop], _mark(EOSS)]
        position = stop
    tokens, is_target, places = np.concatenate([*pieces, source[:, position:], *tail, _mark(EOS)], axis=1)
    return Masked(tokens, is_target.astype(bool), places, tuple(spans))


def _mark(token: int, is_target: bool = True) -> np.ndarray:
    return np.array([[token], [int(is_target)], [0]])


def mask(
    body: Body,
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    *,
    mean_masks: float = 1.0,
    segment_rate: float = 0.0,
    text_share: float = 0.5,
    longest: int | None = None,
) -> Masked:
    """One draw of the objective for one sequence; spans that would make it longer than ``longest`` tokens are left out."""
    if segment_rate and rng.random() < segment_rate:
        segment = draw_segment(body, text_share, rng)
        return apply_spans(body, [(segment.start, segment.stop)], vocabulary)
    spans = draw_spans(body, mean_masks, vocabulary.sentinels, rng)
    if longest is not None:
        spans = spans[: max((longest - len(body.tokens) - 1) // 3, 0)]
    return apply_spans(body, spans, vocabulary)
