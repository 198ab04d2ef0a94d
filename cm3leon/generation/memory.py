"""Retrieval at inference: documents of the bundle's memory bank that stand before a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from cm3leon.config.schema import RetrieveConfig
from cm3leon.data.tokens import TokenStore
from cm3leon.generation.results import Neighbor
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.sequence.tasks import SegmentTokens

if TYPE_CHECKING:
    from cm3leon.models.clip import Encoder
    from cm3leon.retrieval.index import MemoryBank


@dataclass(frozen=True)
class Memory:
    """The memory bank, the encoder that its vectors come from, its documents' tokens, and the rules by which neighbors are taken."""

    bank: MemoryBank
    encoder: Encoder
    tokens: TokenStore
    rules: RetrieveConfig

    def find(self, count: int, texts: Sequence[str] | None = None, images: Sequence[Image.Image] | None = None) -> list[list[Neighbor]]:
        """Up to ``count`` documents for each query, by its text, its image or both, each found by text before each found by image.

        Raises:
            ValueError: if there is neither text nor image.
        """
        from cm3leon.retrieval.strategy import find

        by_text = None if texts is None else self.encoder.encode_texts(list(texts))
        by_image = None if images is None else self.encoder.encode_images(list(images))
        found = find(self.bank, self.rules.model_copy(update={"candidates_per_modality": count}), text=by_text, image=by_image)
        documents = self.bank.documents
        queries = []
        for group in found:
            by_modality = [[n for n in group if n.modality == name] for name in ("text", "image")]
            turns = [n for place in range(count) for own in by_modality for n in own[place : place + 1]][:count]
            queries.append([{**documents.iloc[n.position].to_dict(), "score": round(n.score, 4)} for n in turns])
        return queries

    def segments(self, neighbor: Neighbor, vocabulary: Vocabulary) -> list[SegmentTokens]:
        """A document as it stands before a prompt: its first caption, the one shown, and its image."""
        document = self.tokens.by_id(neighbor["id"])
        return [("text", vocabulary.text(document.captions[0])), ("image", vocabulary.image(document.codes))]
