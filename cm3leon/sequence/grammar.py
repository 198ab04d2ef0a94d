"""The grammar of a sequence: how token ids are laid out, and how documents become a sequence of segments.

A training sequence (paper, Fig. 9) is ``<eos> (text <break> image <break>)*K  text <break> image <eos>``: retrieved documents first,
the query last; ``<eos>`` also opens it. Under CM3 masking each masked span is replaced by a sentinel ``<mask:i>`` and moved to the end:
``<eos> body (<mask:i> span <eoss>)* <eos>``. Images are never cut: each has exactly ``tokens_per_image`` codes.

Token ids are ordered ``specials | sentinels | reserved | image codes | text``, so that the image rows of the output matrix are contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cm3leon.utils.errors import UserError

PAD, EOS, BREAK, EOSS = 0, 1, 2, 3
SPECIALS = ("<pad>", "<eos>", "<break>", "<eoss>")
UNKNOWN = -1
"""In the place of a token that is to be generated."""

Tokens = np.ndarray
"""One-dimensional int64 array of token ids."""


class GrammarError(UserError):
    """A token sequence does not follow the grammar; the message says where."""


@dataclass(frozen=True)
class Vocabulary:
    """Layout of the token ids; stored with the model.

    Attributes:
        text_size: ids of the text tokenizer.
        image_size: codebook size of the image tokenizer.
        sentinels: number of mask tokens ``<mask:i>``.
        reserved: unused ids, kept for later tokens and a round total (65,536 in the paper).
    """

    text_size: int
    image_size: int
    sentinels: int
    tokens_per_image: int
    reserved: int = 0

    @property
    def image_start(self) -> int:
        return len(SPECIALS) + self.sentinels + self.reserved

    @property
    def text_start(self) -> int:
        return self.image_start + self.image_size

    @property
    def size(self) -> int:
        return self.text_start + self.text_size

    def sentinel(self, index: int) -> int:
        """Id of ``<mask:index>``."""
        if not 0 <= index < self.sentinels:
            raise ValueError(f"sentinel {index} is not in the vocabulary, which has {self.sentinels}")
        return len(SPECIALS) + index

    def is_sentinel(self, ids: Tokens) -> np.ndarray:
        return (ids >= len(SPECIALS)) & (ids < len(SPECIALS) + self.sentinels)

    def is_image(self, ids: Tokens) -> np.ndarray:
        return (ids >= self.image_start) & (ids < self.text_start)

    def is_text(self, ids: Tokens) -> np.ndarray:
        return ids >= self.text_start

    def text(self, text_ids: Sequence[int] | Tokens) -> Tokens:
        """Token ids of text-tokenizer ids."""
        return np.asarray(text_ids, dtype=np.int64) + self.text_start

    def image(self, codes: Sequence[int] | Tokens) -> Tokens:
        """Token ids of image codes.

        Raises:
            ValueError: if it is not one whole image.
        """
        if len(codes) != self.tokens_per_image:
            raise ValueError(f"an image has {self.tokens_per_image} codes, found {len(codes)}")
        return np.asarray(codes, dtype=np.int64) + self.image_start

    def image_positions(self, tokens: Tokens) -> np.ndarray:
        """:attr:`Body.image_positions` of any sequence in which images are whole."""
        image = self.is_image(tokens)
        return np.where(image, (np.cumsum(image) - 1) % self.tokens_per_image + 1, 0)

    def role(self, token: int) -> str:
        """The kind of a token, for people: ``text``, ``image``, ``<mask:3>``, ``<break>`` ..."""
        if token < len(SPECIALS):
            return SPECIALS[token]
        if token < len(SPECIALS) + self.sentinels:
            return f"<mask:{token - len(SPECIALS)}>"
        if token < self.image_start:
            return "<reserved>"
        return "image" if token < self.text_start else "text"


@dataclass(frozen=True)
class Segment:
    """One modality of one document, between breaks: ``tokens[start:stop]`` of a body. ``document`` counts from 0; the query is the last."""

    start: int
    stop: int
    document: int
    modality: str

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Body:
    """An unmasked sequence without its closing ``<eos>``, and its segments in order."""

    tokens: Tokens
    segments: tuple[Segment, ...]

    @property
    def image_positions(self) -> np.ndarray:
        """Raster index of each token in its image (T,), from 1; 0 for tokens of no image."""
        image_positions = np.zeros(len(self.tokens), dtype=np.int64)
        for segment in self.segments:
            if segment.modality == "image":
                image_positions[segment.start : segment.stop] = np.arange(1, segment.length + 1)
        return image_positions

    def prompt(self) -> Prompt:
        """The body as a prompt, to be continued where it ends."""
        return Prompt(self.tokens, self.image_positions)

    def finished(self) -> Tokens:
        """The unmasked training sequence."""
        return np.append(self.tokens, EOS)

    def without(self, dropped: np.ndarray) -> Body:
        """The body without the tokens where ``dropped`` (T,), boolean, is true; segments shrink, and an empty one remains."""
        before = np.concatenate([[0], np.cumsum(~dropped)])
        segments = [Segment(int(before[s.start]), int(before[s.stop]), s.document, s.modality) for s in self.segments]
        return Body(self.tokens[~dropped], tuple(segments))


@dataclass(frozen=True)
class Prompt:
    """Tokens to be continued, and the raster index of each in its image as :attr:`Body.image_positions`; both (T,)."""

    tokens: Tokens
    image_positions: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def followed_by(self, *marks: int) -> Prompt:
        """With special tokens appended, which belong to no image."""
        return Prompt(np.append(self.tokens, marks), np.append(self.image_positions, [0] * len(marks)))


def build_body(documents: Sequence[Sequence[tuple[str, Tokens]]]) -> Body:
    """Lay out documents as one sequence, the retrieved documents first and the query last.

    Args:
        documents: each a list of segments, (modality, token ids), modality ``text`` or ``image``.
    """
    parts: list[Tokens] = [np.array([EOS])]
    segments = []
    position = 1
    for number, document in enumerate(documents):
        for modality, ids in document:
            if position > 1:
                parts.append(np.array([BREAK]))
                position += 1
            parts.append(ids)
            segments.append(Segment(position, position + len(ids), number, modality))
            position += len(ids)
    return Body(np.concatenate(parts).astype(np.int64), tuple(segments))


def check_grammar(tokens: Tokens, vocabulary: Vocabulary) -> None:
    """Check a finished sequence, masked or not.

    Raises:
        GrammarError: naming the first position that breaks the grammar.
    """
    if len(tokens) < 2 or tokens[0] != EOS or tokens[-1] != EOS:
        raise GrammarError("a sequence begins and ends with <eos>")
    # 1. Tokens that stand nowhere inside a sequence.
    inner = tokens[1:-1]
    if np.any(tokens >= vocabulary.size):
        position = int(np.flatnonzero(tokens >= vocabulary.size)[0])
        raise GrammarError(f"token {int(tokens[position])} at {position} is not in the vocabulary of {vocabulary.size}")
    if np.any(inner == EOS) or np.any(inner == PAD):
        raise GrammarError(f"<eos> or <pad> inside the sequence, at {1 + int(np.flatnonzero((inner == EOS) | (inner == PAD))[0])}")
    # 2. Each mask of the body has its span in the tail, in the same order.
    body, tail = split_tail(inner, vocabulary)
    masks = [int(t) for t in body if vocabulary.is_sentinel(np.array(t))]
    if masks != [mask for mask, _ in tail]:
        raise GrammarError(f"masks in the body {masks} are not those of the tail {[m for m, _ in tail]}")
    # 3. With the spans back in place, segments between breaks are of one modality, images whole.
    restored = restore(body, tail)
    position = 1
    for part in np.split(restored, np.flatnonzero(restored == BREAK)):
        ids = part[1:] if len(part) and part[0] == BREAK else part
        image = vocabulary.is_image(ids)
        if image.any() and not (image.all() and len(ids) == vocabulary.tokens_per_image):
            raise GrammarError(f"the segment at {position} is neither text nor one whole image of {vocabulary.tokens_per_image} codes")
        if not image.any() and not np.all(vocabulary.is_text(ids)):
            raise GrammarError(f"the segment at {position} holds a token that is neither text nor image")
        position += len(part)


def split_tail(inner: Tokens, vocabulary: Vocabulary) -> tuple[Tokens, list[tuple[int, Tokens]]]:
    """Split a sequence without its outer ``<eos>`` into the body and the moved spans [(sentinel, span)].

    Raises:
        GrammarError: if a span is not closed by ``<eoss>``.
    """
    ends = np.flatnonzero(inner == EOSS)
    if len(ends) == 0:
        if vocabulary.is_sentinel(inner).any():
            raise GrammarError("a mask without its span: no <eoss> in the sequence")
        return inner, []
    sentinels = np.flatnonzero(vocabulary.is_sentinel(inner))
    if len(sentinels) != 2 * len(ends):
        raise GrammarError(f"{len(sentinels)} mask tokens for {len(ends)} spans; each span has one in the body and one in the tail")
    heads = sentinels[len(ends) :]
    tail = []
    for index, (head, end) in enumerate(zip(heads, ends, strict=True)):
        following = heads[index + 1] if index + 1 < len(heads) else len(inner)
        if not head < end == following - 1:
            raise GrammarError(f"the span at {1 + int(head)} is not closed by <eoss> where the next begins")
        tail.append((int(inner[head]), inner[head + 1 : end]))
    return inner[: heads[0]], tail


def restore(body: Tokens, tail: Sequence[tuple[int, Tokens]]) -> Tokens:
    """Put the moved spans back in place of their sentinels."""
    for sentinel, span in tail:
        position = int(np.flatnonzero(body == sentinel)[0])
        body = np.concatenate([body[:position], span, body[position + 1 :]])
    return body
