"""Training sequences and batches: documents, their neighbours and the objective put together.

Everything random about a sample derives from ``(seed, epoch, id)``, and batch ``step`` from ``(seed, step)`` alone: the same whatever
reads them, in whatever order, and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cm3leon.config import ObjectiveConfig, UserError
from cm3leon.data.tokens import Document, TokenStore
from cm3leon.documents import PAD, Body, Vocabulary, build_body
from cm3leon.objective import Masked, mask

SORT_BATCHES = 16
"""Samples of this many batches are sorted by length together, so that little is padded."""

MASK_ROOM = 12
"""Tokens of the context kept free for the marks of masked spans, three a span; more spans than fit are not drawn."""

Draw = Callable[[int, int], tuple[Masked, np.ndarray]]
"""``draw(epoch, row)`` -> a masked sequence and the weight of each of its tokens in the loss."""


@dataclass(frozen=True)
class Batch:
    """Token ids (B, T) int64, padded on the right; the weight of each as a target (B, T) float32, 0 on what is not one; and the
    place of each in its image (B, T) int64, from 1, 0 on what is no image token."""

    tokens: Tensor
    weights: Tensor
    places: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.tokens.to(device), self.weights.to(device), self.places.to(device))


def sample_rng(seed: int, epoch: int, name: str) -> np.random.Generator:
    """The generator of one document in one epoch."""
    return np.random.default_rng((seed, epoch, int(name, 16)))


def read_neighbours(directory: Path) -> dict[str, list[str]]:
    """The neighbour table written by ``retrieve``: id -> ids of its neighbours."""
    import pyarrow.parquet as pq

    table = pq.read_table(directory / "neighbours.parquet", columns=["id", "neighbours"])
    return dict(zip(table["id"].to_pylist(), table["neighbours"].to_pylist(), strict=True))


def document_segments(document: Document, vocabulary: Vocabulary, rng: np.random.Generator) -> list[tuple[str, np.ndarray]]:
    """``text <break> image`` of a document, with one of its captions at random."""
    text = document.texts[int(rng.integers(len(document.texts)))]
    return [("text", vocabulary.text(text)), ("image", vocabulary.image(document.codes))]


def choose_neighbours(candidates: Sequence[str], shares: Sequence[float], rng: np.random.Generator) -> list[str]:
    """Draw how many retrieved documents stand before a sample, and which, in random order."""
    wanted = int(rng.choice(len(shares), p=np.asarray(shares) / sum(shares)))
    count = min(wanted, len(candidates))
    return [candidates[int(i)] for i in rng.permutation(len(candidates))[:count]]


def fit_body(documents: list[list[tuple[str, np.ndarray]]], longest: int) -> Body:
    """Lay the documents out in at most ``longest`` tokens: drop retrieved documents first, then cut the query's text, never an image.

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
            raise UserError(f"a sequence needs {len(body.tokens)} tokens without its text; the longest allowed is {longest}: raise context")
        body = build_body([query])
    return body


@dataclass(frozen=True)
class PretrainingSamples:
    """Samples of CM3 pretraining: neighbours, the document, one draw of the objective."""

    store: TokenStore
    pool: TokenStore
    neighbours: Mapping[str, Sequence[str]]
    vocabulary: Vocabulary
    objective: ObjectiveConfig
    documents: Sequence[float]
    context: int
    seed: int

    def __len__(self) -> int:
        return len(self.store)

    def neighbours_of(self, name: str, rng: np.random.Generator) -> list[list[tuple[str, np.ndarray]]]:
        chosen = choose_neighbours(self.neighbours.get(name, []), self.documents, rng)
        return [document_segments(self.pool.by_id(other), self.vocabulary, rng) for other in chosen]

    def __call__(self, epoch: int, row: int) -> tuple[Masked, np.ndarray]:
        document = self.store[row]
        rng = sample_rng(self.seed, epoch, document.id)
        retrieved = self.neighbours_of(document.id, rng)
        query = document_segments(document, self.vocabulary, rng)
        body = fit_body([*retrieved, query], self.context - 1 - MASK_ROOM)
        masked = mask(
            body,
            self.vocabulary,
            rng,
            mean_masks=self.objective.mean_masks,
            segment_rate=self.objective.segment_rate,
            text_share=self.objective.caption_share,
            longest=self.context,
        )
        return masked, masked.is_target.astype(np.float32)


def collate(samples: Sequence[tuple[Masked, np.ndarray]]) -> Batch:
    """Pad on the right to the longest. The opening ``<eos>`` is never a target."""
    length = max(len(masked.tokens) for masked, _ in samples)
    tokens = np.full((len(samples), length), PAD, dtype=np.int64)
    weights = np.zeros((len(samples), length), dtype=np.float32)
    places = np.zeros((len(samples), length), dtype=np.int64)
    for row, (masked, weight) in enumerate(samples):
        tokens[row, : len(masked.tokens)] = masked.tokens
        weights[row, : len(masked.tokens)] = weight
        places[row, : len(masked.tokens)] = masked.places
    weights[:, 0] = 0
    return Batch(torch.from_numpy(tokens), torch.from_numpy(weights), torch.from_numpy(places))


class BatchStream:
    """Batch number ``step`` of an endless stream of shuffled epochs.

    Groups of ``SORT_BATCHES`` batches are drawn together, sorted by length and dealt out in random order.
    """

    def __init__(self, draw: Draw, size: int, batch_size: int, seed: int) -> None:
        if size < 1:
            raise ValueError("no documents to train on")
        self.draw, self.size, self.batch_size, self.seed = draw, size, batch_size, seed
        self._group = -1
        self._batches: list[list[tuple[Masked, np.ndarray]]] = []
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, step: int) -> Batch:
        group, within = divmod(step, SORT_BATCHES)
        if group != self._group:
            self._group, self._batches = group, self._draw_group(group)
        return collate(self._batches[within])

    def _draw_group(self, group: int) -> list[list[tuple[Masked, np.ndarray]]]:
        first = group * SORT_BATCHES * self.batch_size
        places = [divmod(position, self.size) for position in range(first, first + SORT_BATCHES * self.batch_size)]
        samples = [self.draw(epoch, int(self._order(epoch)[position])) for epoch, position in places]
        samples.sort(key=lambda sample: len(sample[0].tokens))
        batches = [samples[i : i + self.batch_size] for i in range(0, len(samples), self.batch_size)]
        order = np.random.default_rng((self.seed, 2, group)).permutation(len(batches))
        return [batches[int(i)] for i in order]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = np.random.default_rng((self.seed, 1, epoch)).permutation(self.size)
        return self._orders[epoch]
