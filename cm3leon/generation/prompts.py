"""Prompts: the tokens that precede what is generated, laid out as in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

import numpy as np

from cm3leon.sequence.cm3 import apply_spans, region_spans
from cm3leon.sequence.grammar import UNKNOWN, Prompt, Tokens, Vocabulary, build_body
from cm3leon.sequence.tasks import BREAK, SegmentTokens, split_template

if TYPE_CHECKING:
    from cm3leon.sequence.text_tokenizer import TextTokenizer


def image_prompt(
    query: Sequence[SegmentTokens],
    retrieved: Sequence[Sequence[SegmentTokens]],
    vocabulary: Vocabulary,
    masked: AbstractSet[int] = frozenset(),
) -> Prompt:
    """The prompt whose continuation is an image: retrieved documents, the query's segments, ``<break>``.

    Args:
        masked: the query's segments that are replaced by a mask, as in conditioning dropout; with all of them masked it is the
            unconditional stream of guidance, ``<eos> <mask:0> <break>``, which keeps the retrieved documents.
    """
    segments, masks = [], 0
    for number, (modality, ids) in enumerate(query):
        if number in masked:
            modality, ids, masks = "text", np.array([vocabulary.sentinel(masks)]), masks + 1
        segments.append((modality, ids))
    # An empty image segment makes the prompt end in the <break> that an image follows.
    return build_body([*retrieved, [*segments, ("image", np.zeros(0, dtype=np.int64))]]).prompt()


def infill_prompt(text: Tokens, codes: np.ndarray, region: np.ndarray, vocabulary: Vocabulary) -> tuple[Prompt, Prompt]:
    """The prompt that ends where a region of an image is to be generated, and its continuation, both as in training.

    The continuation has the region's codes, :data:`~cm3leon.sequence.grammar.UNKNOWN`, and between its rows ``<eoss> <mask:i>``.

    Args:
        region: boolean (tokens_per_image,), in raster order.
    """
    body = build_body([[("text", text), ("image", vocabulary.image(codes))]])
    image = body.segments[-1].start
    spans = region_spans(region, vocabulary.sentinels)
    masked = apply_spans(body, [(image + start, image + stop) for start, stop in spans], vocabulary)
    tail = sum(stop - start + 2 for start, stop in spans)  # each span with its mask and <eoss>; <eos> follows
    tokens, image_positions = masked.tokens[:-2], masked.image_positions[:-2]
    end = len(masked.tokens) - tail  # after the first mask of the tail
    unknown = vocabulary.is_image(tokens[end:]) & region[image_positions[end:] - 1]
    return Prompt(tokens[:end], image_positions[:end]), Prompt(np.where(unknown, UNKNOWN, tokens[end:]), image_positions[end:])


def answer_prompt(template: str, values: Mapping[str, str], codes: np.ndarray, vocabulary: Vocabulary, tokenizer: TextTokenizer) -> Prompt:
    """The prompt whose continuation, up to ``<eoss>``, is the answer: ``instruction <mask:0> <break> image <mask:0>``."""
    before, _, after = split_template(template.split(BREAK)[0], values)
    mask = vocabulary.sentinel(0)
    text = np.concatenate([vocabulary.text(tokenizer.encode(before)), [mask], vocabulary.text(tokenizer.encode(after))])
    return build_body([[("text", text), ("image", vocabulary.image(codes))]]).prompt().followed_by(mask)


def blanks_prompt(pieces: Sequence[Tokens], codes: np.ndarray | None, vocabulary: Vocabulary) -> Prompt:
    """The prompt whose continuation, up to ``<eoss>``, fills the first blank of a text.

    Args:
        pieces: the text around its blanks, each of which becomes a mask.
        codes: of an image that follows the text; None: there is none.
    """
    masked = [[vocabulary.sentinel(number), *piece] for number, piece in enumerate(pieces[1:])]
    text = np.concatenate([pieces[0], *masked]).astype(np.int64)
    image = [] if codes is None else [("image", vocabulary.image(codes))]
    return build_body([[("text", text), *image]]).prompt().followed_by(vocabulary.sentinel(0))


def likelihood_pair(
    query: Sequence[SegmentTokens], codes: np.ndarray, masked: Sequence[int], vocabulary: Vocabulary, joint: bool = False
) -> tuple[Prompt, Prompt]:
    """The sequence by which the log-likelihood of some of a query's segments, given its image, is measured.

    Those segments are masked, as in training, so that they follow the image. The prompt ends in the first mask after the image; the
    continuation is what comes then, which includes each segment's ``<eoss>``.

    Args:
        joint: of the image and those segments: the prompt ends before the image.
    """
    body = build_body([[*query, ("image", vocabulary.image(codes))]])
    spans = [(body.segments[number].start, body.segments[number].stop) for number in masked]
    whole = apply_spans(body, spans, vocabulary)
    # The body without the spans and with a mask for each, and the first mask of the tail.
    left = len(spans) - sum(stop - start for start, stop in spans)
    split = left + (body.segments[-1].start if joint else len(body.tokens) + 1)
    tokens, image_positions = whole.tokens[:-1], whole.image_positions[:-1]
    return Prompt(tokens[:split], image_positions[:split]), Prompt(tokens[split:], image_positions[split:])
