"""Pretraining samples: a document, its retrieved neighbors, and one application of the CM3 objective.

Everything random about a sample derives from ``(seed, epoch, id)``: it does not depend on the reading process, the order, or a resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cm3leon.data.rows_by_id import RowsById
from cm3leon.data.tokens import Document, TokenStore
from cm3leon.sequence.cm3 import Masked, mask
from cm3leon.sequence.grammar import BREAK, Body, Vocabulary, build_body
from cm3leon.utils.errors import UserError
from cm3leon.utils.files import read_file

if TYPE_CHECKING:
    import pyarrow as pa

    from cm3leon.config.schema import NeighborChoice, ObjectiveConfig


class Sample(NamedTuple):
    """A training sample.

    Attributes:
        masked: the sequence.
        weights: (T,), weight of each token in the loss.
        documents: ids of the documents in the sequence, the query last; ``documents[segment.document]`` is that of a segment.
        task: number of its task, from 1, for a loss of each task; 0 for none.
    """

    masked: Masked
    weights: np.ndarray
    documents: tuple[str, ...]
    task: int = 0


def sample_rng(seed: int, epoch: int, document_id: str, repeat: int = 0) -> np.random.Generator:
    """The random generator of one document in one epoch; ``repeat`` is how often the epoch had it before."""
    return np.random.default_rng((seed, epoch, int(document_id, 16), *([repeat] if repeat else [])))


class Neighbors(Mapping[str, Sequence[str]]):
    """Ids of each document's neighbors; see :func:`read_neighbors`."""

    def __init__(self, table: pa.Table, choice: NeighborChoice) -> None:
        self.rows, self.choice = RowsById(table), choice

    def __getitem__(self, document_id: str) -> Sequence[str]:
        row = self.rows[document_id]
        if self.choice == "random":
            return list(row["random"])
        found = zip(row["neighbours"], row["modalities"], strict=True)
        return [other for other, modality in found if self.choice in ("paper", modality)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def read_neighbors(directory: Path, choice: NeighborChoice = "paper") -> Mapping[str, Sequence[str]]:
    """The neighbor table written by ``retrieve``: ids of each document's neighbors.

    Args:
        choice: ``paper``: all; ``text`` or ``image``: those found by that modality of the document; ``random``: documents sampled at random
            under the same rules; ``none``: an empty table.

    Raises:
        FileNotFoundError: if there is none.
        DamagedFileError: if it is truncated.
    """
    import pyarrow.parquet as pq

    if choice == "none":
        return {}
    columns = ["id", "random"] if choice == "random" else ["id", "neighbours", "modalities"]
    return Neighbors(read_file(directory / "neighbours.parquet", partial(pq.read_table, columns=columns), "cm3leon retrieve"), choice)


def document_segments(document: Document, vocabulary: Vocabulary, rng: np.random.Generator) -> list[tuple[str, np.ndarray]]:
    """The segments ``text <break> image`` of a document, with one of its captions at random."""
    caption = document.captions[int(rng.integers(len(document.captions)))]
    return [("text", vocabulary.text(caption)), ("image", vocabulary.image(document.codes))]


def sample_neighbors(candidates: Sequence[str], shares: Sequence[float], rng: np.random.Generator) -> list[str]:
    """Sample how many retrieved documents a sample gets (``shares[n]``: probability of n), and which, in random order."""
    wanted = int(rng.choice(len(shares), p=np.asarray(shares) / sum(shares)))
    count = min(wanted, len(candidates))
    return [candidates[int(i)] for i in rng.permutation(len(candidates))[:count]]


def fit_body(documents: list[list[tuple[str, np.ndarray]]], longest: int) -> Body:
    """Lay documents out in at most ``longest`` tokens: (1) drop retrieved documents, (2) cut the query's text; never cut an image.

    Raises:
        UserError: if the query's image alone is too long.
    """
    body = build_body(documents)
    while len(body.tokens) > longest and len(documents) > 1:
        documents = documents[1:]
        body = build_body(documents)
    excess = len(body.tokens) - longest
    if excess > 0:
        query = []
        for modality, ids in documents[-1]:
            cut = min(excess, len(ids)) if modality == "text" else 0
            excess -= cut
            query.append((modality, ids[: len(ids) - cut]))
        if excess > 0:
            raise UserError(
                f"a sequence needs {longest + excess} tokens without its text, and {longest} are allowed: "
                f"raise pretrain.model.context by {excess}"
            )
        body = build_body([query])
    return body


def kept_documents(body: Body, documents: Sequence[str]) -> tuple[str, ...]:
    """The documents that :func:`fit_body` kept: the last ones."""
    return tuple(documents[len(documents) - 1 - body.segments[-1].document :])


@dataclass(frozen=True)
class PretrainingSamples:
    """Samples of CM3 pretraining.

    Attributes:
        store: the documents of the split, the queries.
        pool: the documents that can be retrieved.
        neighbors: ids of each document's neighbors.
        retrieved_shares: probability of 0, 1, 2 ... retrieved documents.
        context: longest sequence, tokens.
    """

    store: TokenStore
    pool: TokenStore
    neighbors: Mapping[str, Sequence[str]]
    vocabulary: Vocabulary
    objective: ObjectiveConfig
    retrieved_shares: Sequence[float]
    context: int
    seed: int

    def __len__(self) -> int:
        return len(self.store)

    def sample_retrieved(self, document_id: str, rng: np.random.Generator) -> tuple[list[str], list[list[tuple[str, np.ndarray]]]]:
        """Ids and segments of the retrieved documents sampled for a query."""
        chosen = sample_neighbors(self.neighbors.get(document_id, []), self.retrieved_shares, rng)
        return chosen, [document_segments(self.pool.by_id(other), self.vocabulary, rng) for other in chosen]

    def __call__(self, epoch: int, row: int) -> Sample:
        document = self.store[row]
        rng = sample_rng(self.seed, epoch, document.id)
        # First the query: its caption is the same with and without retrieved documents.
        query = document_segments(document, self.vocabulary, rng)
        chosen, retrieved = self.sample_retrieved(document.id, rng)
        body = fit_body([*retrieved, query], self.context - 1)
        masked = mask(
            body,
            self.vocabulary,
            rng,
            mean_masks=self.objective.mean_masks,
            segment_rate=self.objective.segment_rate,
            text_share=self.objective.caption_share,
            across_breaks=self.objective.across_breaks,
            longest=self.context,
        )
        weight = masked.is_target.astype(np.float32)
        source = slice(masked.tail)
        weight[source][masked.image_positions[source] == 0] *= self.objective.text_weight
        return Sample(masked, weight, kept_documents(body, [*chosen, document.id]))

    def query_only(self, epoch: int, row: int) -> Sample:
        """The same sample with the loss on the query alone; for unmasked sequences."""
        sample = self(epoch, row)
        breaks = np.flatnonzero(sample.masked.tokens == BREAK)
        if len(breaks) > 1:
            sample.weights[: breaks[-2] + 1] = 0  # the query is the last text and the last image
        return sample
