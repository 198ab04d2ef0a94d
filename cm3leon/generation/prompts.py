"""What stands before what is generated, laid out as in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from cm3leon.sequence.cm3 import apply_spans
from cm3leon.sequence.grammar import Prompt, Tokens, Vocabulary, build_body
from cm3leon.sequence.tasks import BREAK, SegmentTokens, split_template
from cm3leon.sequence.text_tokenizer import TextTokenizer


@dataclass(frozen=True)
class Query:
    """What stands before an image to draw.

    hidden: the segments by whose likelihood, read from the image, candidates are ranked (none: they are not). describes: whether the prompt
    shown describes the image, so that CLIP can compare the two.
    """

    segments: list[SegmentTokens]
    hidden: tuple[int, ...] = ()
    describes: bool = True


def answer_prompt(template: str, values: Mapping[str, str], codes: np.ndarray, vocabulary: Vocabulary, tokenizer: TextTokenizer) -> Prompt:
    """The prompt whose continuation, up to ``<eoss>``, is the answer."""
    before, _, after = split_template(template.split(BREAK)[0], values)
    mask = vocabulary.sentinel(0)
    text = np.concatenate([vocabulary.text(tokenizer.encode(before)), [mask], vocabulary.text(tokenizer.encode(after))])
    return build_body([[("text", text), ("image", vocabulary.image(codes))]]).prompt().followed_by(mask)


def blanks_prompt(parts: Sequence[Tokens], codes: np.ndarray | None, vocabulary: Vocabulary) -> Prompt:
    """A text between whose ``parts`` is something to be infilled, an image behind it if there is one; ends with the first blank's mask."""
    text = np.concatenate([parts[0], *([vocabulary.sentinel(number), *part] for number, part in enumerate(parts[1:]))]).astype(np.int64)
    image = [] if codes is None else [("image", vocabulary.image(codes))]
    return build_body([[("text", text), *image]]).prompt().followed_by(vocabulary.sentinel(0))


def image_prompt(
    query: Sequence[SegmentTokens],
    retrieved: Sequence[Sequence[SegmentTokens]],
    vocabulary: Vocabulary,
    masked: AbstractSet[int] = frozenset(),
) -> Prompt:
    """The prompt whose continuation is an image: retrieved documents, the query's segments, ``<break>``.

    Args:
        masked: which of the query's segments only their mask stands for; that of all is the unconditional stream of guidance.
    """
    segments, masks = [], 0
    for number, (modality, ids) in enumerate(query):
        if number in masked:
            modality, ids, masks = "text", np.array([vocabulary.sentinel(masks)]), masks + 1
        segments.append((modality, ids))
    return build_body([*retrieved, [*segments, ("image", np.zeros(0, dtype=np.int64))]]).prompt()


def infill_prompt(text: Tokens, codes: np.ndarray, span: tuple[int, int], vocabulary: Vocabulary) -> Prompt:
    """The prompt whose continuation are the image's codes in ``span``, up to ``<eoss>``: as the objective masks them."""
    body = build_body([[("text", text), ("image", vocabulary.image(codes))]])
    start = body.segments[-1].start
    masked = apply_spans(body, [(start + span[0], start + span[1])], vocabulary)
    end = len(masked.tokens) - 2 - (span[1] - span[0])  # behind the mask in the tail; its span, <eoss> and <eos> follow
    return Prompt(masked.tokens[:end], masked.image_positions[:end])


def reading_pair(query: Sequence[SegmentTokens], codes: np.ndarray, hidden: Sequence[int], vocabulary: Vocabulary) -> tuple[Prompt, Prompt]:
    """How a model reads from a drawn image what it was asked: the prompt up to the first mask behind the image, and what follows, which is
    the ``hidden`` segments of the query, as in training."""
    body = build_body([[*query, ("image", vocabulary.image(codes))]])
    masked = apply_spans(body, [(body.segments[number].start, body.segments[number].stop) for number in hidden], vocabulary)
    split = len(body.tokens) + len(hidden) - sum(body.segments[number].length for number in hidden) + 1
    whole = Prompt(masked.tokens[:-1], masked.image_positions[:-1])
    return Prompt(whole.tokens[:split], whole.image_positions[:split]), Prompt(whole.tokens[split:], whole.image_positions[split:])
