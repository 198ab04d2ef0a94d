"""Which documents are retrieved for a query: the paper's rules on top of maximum inner product search (section 2.1; RA-CM3, section 3.2).

Candidates are found by the query's text and by its image, and taken in order of relevance. A candidate is skipped if its score to the
query, or to a document already taken, is above ``max_score``; the query itself is never taken. The memory bank holds only documents of the
train split that have both text and image.

Shapes: q queries, k candidates of each, d dimensions, t documents already taken.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cm3leon.config.schema import RetrieveConfig
from cm3leon.retrieval.index import MemoryBank
from cm3leon.retrieval.vectors import chunks, document_vectors

TEXT, IMAGE = "text", "image"
FAISS_PRODUCT = 128_000
FIRST_CANDIDATES = 32
"""Candidates that the rules are applied to first, as to read the vectors of all takes ten times longer than to search for them."""
_MAX_FLOATS = 1 << 24  # of candidate vectors gathered at once: 64 MB


def search_batch(dimensions: int) -> int:
    """Queries that are searched together: 512, or more where vectors are short.

    FAISS multiplies matrices from 128,000 on, queries times dimensions; with fewer it takes the vectors one by one. At 512 dimensions over
    100,000 vectors a query took 7 ms in batches of 128 and 0.4 ms in batches of 256 or 512; larger ones gain little and often cost more,
    as the results of all queries no longer fit in the processor's cache (``benchmarks/retrieval.py``).
    """
    return max(512, -(-FAISS_PRODUCT // dimensions))


@dataclass(frozen=True)
class Neighbor:
    """A retrieved document: its position in the bank, its score to the query, and the modality of the query that found it."""

    position: int
    score: float
    modality: str


def drop_words(text: str, rate: float, seed: int, key: str) -> str:
    """``text`` without a share ``rate`` of its words, rounded; one word always stays. The same for the same seed and key.

    The paper drops 20 % of the query's tokens. Words are dropped here, because the encoder has a tokenizer of its own.
    """
    words = text.split()
    dropped = min(round(rate * len(words)), len(words) - 1)
    if dropped <= 0:
        return " ".join(words)
    kept = sorted(random.Random(f"{seed}/{key}").sample(range(len(words)), len(words) - dropped))
    return " ".join(words[i] for i in kept)


def select(
    positions: np.ndarray,
    scores: np.ndarray,
    candidates: np.ndarray,
    query: np.ndarray,
    own: np.ndarray,
    taken: np.ndarray,
    count: int,
    max_score: float,
) -> np.ndarray:
    """Choose up to ``count`` candidates for each query by the rules above.

    Args:
        positions: int ``(q, k)``, candidates in the bank, most relevant first; -1: none.
        scores: ``(q, k)``, scores of the candidates to the text or image that found them.
        candidates: ``(q, k, d)`` unit document vectors of the candidates.
        query: ``(q, d)`` unit document vectors of the queries.
        own: int ``(q,)``, each query's own position in the bank; -1: not in it.
        taken: ``(q, t, d)`` document vectors already taken; a row of zeros excludes nothing.
        count: candidates to take.
        max_score: a candidate with a higher score to the query, or to a document already taken, is skipped.

    Returns:
        int ``(q, count)``: columns of ``positions``, in the order taken; -1 where no candidate was left.
    """
    # 1. Exclude the query itself, its near-duplicates, and those of what was taken by the other modality.
    allowed = (positions >= 0) & (positions != own[:, None]) & (scores <= max_score)
    allowed &= np.einsum("qkd,qd->qk", candidates, query) <= max_score
    for t in range(taken.shape[1]):
        allowed &= np.einsum("qkd,qd->qk", candidates, taken[:, t]) <= max_score
    # 2. Take the most relevant candidate of each query, exclude it and its near-duplicates, and repeat.
    chosen = np.full((len(positions), count), -1)
    rows = np.arange(len(positions))
    for i in range(count if positions.shape[1] else 0):
        column = allowed.argmax(axis=1)  # the first that is allowed
        found = allowed[rows, column]
        chosen[found, i] = column[found]
        allowed[rows, column] = False  # with max_score >= 1 a document would not count as its own near-duplicate
        similar = np.einsum("qkd,qd->qk", candidates, candidates[rows, column]) > max_score
        allowed &= ~(similar & found[:, None])
    return chosen


def find(
    bank: MemoryBank,
    config: RetrieveConfig,
    *,
    text: np.ndarray | None = None,
    image: np.ndarray | None = None,
    document: np.ndarray | None = None,
    own: np.ndarray | None = None,
) -> list[list[Neighbor]]:
    """Neighbors of queries: first those found by text, then those found by image, at most ``candidates_per_modality`` of each.

    Args:
        text, image: unit vectors ``(q, d)`` of the queries' texts and images; one may be missing (a prompt has no image).
        document: unit document vectors ``(q, d)`` of the queries, whose near-duplicates are skipped; by default made from ``text`` and
            ``image``. Given when ``text`` is of a text with dropped words.
        own: positions of the queries in the bank, -1 for those that are not in it; None: none of them is.

    Raises:
        ValueError: if there is neither text nor image.
    """
    by_modality = [(name, vectors) for name, vectors in ((TEXT, text), (IMAGE, image)) if vectors is not None]
    if not by_modality:
        raise ValueError("a query needs a text or an image")
    count = len(by_modality[0][1])
    own = np.full(count, -1) if own is None else np.asarray(own)
    document = document_vectors(by_modality[0][1], by_modality[-1][1]) if document is None else document
    depth = min(config.search_depth, len(bank))
    result: list[list[Neighbor]] = []
    for rows in chunks(count, search_batch(bank.settings["dimensions"])):
        result += _find_batch(bank, config, [(name, vectors[rows]) for name, vectors in by_modality], document[rows], own[rows], depth)
    return result


Hits = tuple[str, np.ndarray, np.ndarray]
"""A modality, and the scores and positions ``(q, k)`` that a search by it gave."""


def _find_batch(
    bank: MemoryBank, config: RetrieveConfig, by_modality: list[tuple[str, np.ndarray]], query: np.ndarray, own: np.ndarray, depth: int
) -> list[list[Neighbor]]:
    """:func:`find` for queries that are searched together."""
    hits: list[Hits] = [(name, *bank.search(vectors, depth)) for name, vectors in by_modality]
    found: list[list[Neighbor]] = [[] for _ in own]
    open_rows = np.arange(len(own))
    # The rules take candidates in order, so for a query that finds all it wants among the first ones the others do not matter.
    for width in sorted({min(FIRST_CANDIDATES, depth), depth}):
        for part in chunks(len(open_rows), max(1, _MAX_FLOATS // (width * bank.settings["dimensions"]))):
            rows = open_rows[part]
            cut = [(name, scores[rows, :width], positions[rows, :width]) for name, scores, positions in hits]
            for row, neighbors in zip(rows, _apply_rules(bank, config, cut, query[rows], own[rows]), strict=True):
                found[row] = neighbors
        open_rows = open_rows[[len(found[row]) < config.candidates_per_modality * len(hits) for row in open_rows]]
    return found


def _apply_rules(
    bank: MemoryBank, config: RetrieveConfig, hits: Sequence[Hits], query: np.ndarray, own: np.ndarray
) -> list[list[Neighbor]]:
    """What the rules take of the candidates of as many queries as fit in memory with their candidates' vectors."""
    found: list[list[Neighbor]] = [[] for _ in own]
    taken = np.zeros((len(own), 0, query.shape[1]), dtype=np.float32)
    taken_positions = np.full((len(own), 0), -1)
    rows = np.arange(len(own))[:, None]
    for name, scores, positions in hits:
        # 1. Apply the rules; a document that the text has found is not taken again by the image.
        candidates = bank.vectors(positions)
        repeated = (positions[:, :, None] == taken_positions[:, None, :]).any(axis=2)
        unseen = np.where(repeated, -1, positions)
        columns = select(unseen, scores, candidates, query, own, taken, config.candidates_per_modality, config.max_score)
        # 2. Keep what was taken, for the result and for the next modality.
        present = columns >= 0
        for row, slot in zip(*np.nonzero(present), strict=True):
            column = columns[row, slot]
            found[row].append(Neighbor(int(positions[row, column]), float(scores[row, column]), name))
        taken = np.concatenate([taken, candidates[rows, columns] * present[:, :, None]], axis=1)
        taken_positions = np.concatenate([taken_positions, np.where(present, positions[rows, columns], -1)], axis=1)
    return found


def sample_random(
    bank: MemoryBank,
    config: RetrieveConfig,
    *,
    document: np.ndarray,
    own: np.ndarray,
    counts: Sequence[int],
    keys: Sequence[str],
) -> list[list[int]]:
    """Positions of documents sampled at random under the same rules, the baseline that retrieved documents are compared with.

    Args:
        document, own: as in :func:`find`.
        counts: documents to sample for each query.
        keys: seed of each query; the same key gives the same documents.
    """
    most = max(counts, default=0)
    depth = min(len(bank), 4 * most + 1)  # spare ones, because the rules skip some
    samples = [random.Random(key).sample(range(len(bank)), depth) for key in keys]
    positions = np.array(samples, dtype=np.int64).reshape(len(keys), depth)
    nothing = np.zeros((len(keys), 0, bank.settings["dimensions"]), dtype=np.float32)
    scores = np.zeros(positions.shape)  # no search found them: only their scores to the query as a document are bounded
    columns = select(positions, scores, bank.vectors(positions), document, own, nothing, most, config.max_score)
    rows = zip(positions, columns, counts, strict=True)
    return [[int(row[column]) for column in chosen if column >= 0][:count] for row, chosen, count in rows]


@dataclass
class Coverage:
    """How many neighbors queries have: counted a part of the queries at a time.

    Attributes:
        wanted: neighbors that a query can have.
    """

    wanted: int
    queries: int = 0
    complete: int = 0
    empty: int = 0
    neighbors: int = 0
    score: float = 0.0

    def add(self, found: Sequence[Sequence[Neighbor]]) -> None:
        """Count the neighbors of some queries."""
        self.queries += len(found)
        self.complete += sum(len(neighbors) == self.wanted for neighbors in found)
        self.empty += sum(not neighbors for neighbors in found)
        self.neighbors += sum(map(len, found))
        self.score += sum(neighbor.score for neighbors in found for neighbor in neighbors)

    @property
    def metrics(self) -> dict[str, float]:
        """Share of the queries with all neighbors and with none, mean number of neighbors, and their mean score; 0 without queries."""
        queries = max(1, self.queries)
        return {
            "complete": self.complete / queries,
            "empty": self.empty / queries,
            "neighbors": self.neighbors / queries,
            "score": self.score / max(1, self.neighbors),
        }
