"""Prompts: the tokens that precede what is generated, laid out as in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import numpy as np

from cm3leon.sequence.cm3 import apply_spans
from cm3leon.sequence.grammar import Prompt, Tokens, Vocabulary, build_body
from cm3leon.sequence.tasks import BREAK, SegmentTokens, split_template
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


def infill_prompt(text: Tokens, codes: np.ndarray, span: tuple[int, int], vocabulary: Vocabulary) -> Prompt:
    """The prompt whose continuation, up to ``<eoss>``, is the image's codes in ``span``: a masked span as in CM3 training."""
    body = build_body([[("text", text), ("image", vocabulary.image(codes))]])
    image = body.segments[-1].start
    masked = apply_spans(body, [(image + span[0], image + span[1])], vocabulary)
    end = len(masked.tokens) - 2 - (span[1] - span[0])  # after the tail's mask; the span, <eoss> and <eos> follow it
    return Prompt(masked.tokens[:end], masked.image_positions[:end])


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
    query: Sequence[SegmentTokens], codes: np.ndarray, masked: Sequence[int], vocabulary: Vocabulary
) -> tuple[Prompt, Prompt]:
    """The sequence by which the log-likelihood of some of a query's segments, given its image, is measured.

    Those segments are masked, as in training, so that they follow the image. The prompt ends in the first mask after the image; the
    continuation is what comes then, which includes each segment's ``<eoss>``.
    """
    body = build_body([[*query, ("image", vocabulary.image(codes))]])
    spans = [(body.segments[number].start, body.segments[number].stop) for number in masked]
    whole = apply_spans(body, spans, vocabulary)
    # The body without the spans and with a mask for each, and the first mask of the tail.
    split = len(body.tokens) - sum(stop - start for start, stop in spans) + len(spans) + 1
    tokens, image_positions = whole.tokens[:-1], whole.image_positions[:-1]
    return Prompt(tokens[:split], image_positions[:split]), Prompt(tokens[split:], image_positions[split:])
