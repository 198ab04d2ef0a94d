"""Retrieval at inference: documents of the bundle's memory bank that precede a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from cm3leon.config.schema import RetrieveConfig
from cm3leon.data.manifest import records_of
from cm3leon.data.tokens import TokenStore
from cm3leon.generation.results import RetrievedDocument
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.sequence.tasks import SegmentTokens

if TYPE_CHECKING:
    from cm3leon.models.clip import Encoder
    from cm3leon.retrieval.index import MemoryBank


@dataclass(frozen=True)
class Memory:
    """The memory bank, the encoder that its vectors come from, its documents' tokens, and the rules of retrieval."""

    bank: MemoryBank
    encoder: Encoder
    tokens: TokenStore
    rules: RetrieveConfig

    def find(
        self, count: int, texts: Sequence[str] | None = None, images: Sequence[Image.Image] | None = None
    ) -> list[list[RetrievedDocument]]:
        """Up to ``count`` documents for each query, the most relevant first.

        Queries have a text, an image or both; with both, documents found by text and by image alternate, beginning with text. A field that
        a document lacks, such as an attribution, is None.

        Raises:
            ValueError: if there is neither text nor image.
        """
        from cm3leon.retrieval.strategy import find

        by_text = None if texts is None else self.encoder.encode_texts(list(texts))
        by_image = None if images is None else self.encoder.encode_images(list(images))
        found = find(self.bank, self.rules.model_copy(update={"candidates_per_modality": count}), text=by_text, image=by_image)
        queries = []
        for group in found:
            by_modality = [[neighbor for neighbor in group if neighbor.modality == name] for name in ("text", "image")]
            ranked = [neighbor for rank in range(count) for own in by_modality for neighbor in own[rank : rank + 1]]
            documents = self.bank.documents.iloc[[neighbor.position for neighbor in ranked[:count]]].astype(object)
            records = records_of(documents.where(documents.notna(), None))
            queries.append([{**record, "score": round(neighbor.score, 4)} for record, neighbor in zip(records, ranked, strict=False)])
        return queries

    def segments(self, document: RetrievedDocument, vocabulary: Vocabulary) -> list[SegmentTokens]:
        """A document as it precedes a prompt: its first caption, the one that is shown, and its image."""
        stored = self.tokens.by_id(document["id"])
        return [("text", vocabulary.text(stored.captions[0])), ("image", vocabulary.image(stored.codes))]
