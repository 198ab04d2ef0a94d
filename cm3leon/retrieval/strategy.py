"""Which documents are retrieved for a query: the paper's rules on top of maximum inner product search (section 2.1; RA-CM3, section 3.2).

Candidates are found by the query's text and by its image, and taken in order of relevance. A candidate is skipped if its score to the
query, or to a document already taken, is above ``max_score``; the query itself is never taken. The memory bank holds only documents of the
train split that have both text and image.

Shapes: q queries, k candidates of each, d dimensions, t documents already taken.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cm3leon.config.schema import RetrieveConfig
from cm3leon.retrieval.index import MemoryBank, document_vectors

TEXT, IMAGE = "text", "image"
_MAX_FLOATS = 1 << 24  # of candidate vectors gathered at once: 64 MB


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


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def find(
    bank: MemoryBank,
    config: RetrieveConfig,
    *,
    text: np.ndarray | None = None,
    image: np.ndarray | None = None,
    whole: np.ndarray | None = None,
    own: np.ndarray | None = None,
) -> list[list[Neighbor]]:
    """Neighbors of queries: first those found by text, then those found by image, at most ``candidates_per_modality`` of each.

    Args:
        text, image: unit vectors ``(q, d)`` of the queries' texts and images; one may be missing (a prompt has no image).
        whole: unit document vectors ``(q, d)`` of the queries, whose near-duplicates are skipped; by default made from ``text`` and
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
    whole = document_vectors(by_modality[0][1], by_modality[-1][1]) if whole is None else whole
    result: list[list[Neighbor]] = []
    depth = min(config.search_depth, len(bank))
    for rows in _chunks(count, max(1, _MAX_FLOATS // (depth * bank.settings["dimensions"]))):
        result += _find_chunk(bank, config, [(name, vectors[rows]) for name, vectors in by_modality], whole[rows], own[rows], depth)
    return result


def _find_chunk(
    bank: MemoryBank, config: RetrieveConfig, by_modality: list[tuple[str, np.ndarray]], query: np.ndarray, own: np.ndarray, depth: int
) -> list[list[Neighbor]]:
    """:func:`find` for as many queries as fit in memory with their candidates' vectors."""
    found: list[list[Neighbor]] = [[] for _ in own]
    taken = np.zeros((len(own), 0, query.shape[1]), dtype=np.float32)
    taken_positions = np.full((len(own), 0), -1)
    rows = np.arange(len(own))[:, None]
    for name, vectors in by_modality:
        # 1. Search by this modality.
        scores, positions = bank.search(vectors, depth)
        candidates = bank.vectors(positions)
        # 2. Apply the rules; a document that the text has found is not taken again by the image.
        repeated = (positions[:, :, None] == taken_positions[:, None, :]).any(axis=2)
        unseen = np.where(repeated, -1, positions)
        columns = select(unseen, scores, candidates, query, own, taken, config.candidates_per_modality, config.max_score)
        # 3. Keep what was taken, for the result and for the next modality.
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
    whole: np.ndarray,
    own: np.ndarray,
    counts: Sequence[int],
    keys: Sequence[str],
) -> list[list[int]]:
    """Positions of documents sampled at random under the same rules, the baseline that retrieved documents are compared with.

    Args:
        whole, own: as in :func:`find`.
        counts: documents to sample for each query.
        keys: seed of each query; the same key gives the same documents.
    """
    most = max(counts, default=0)
    depth = min(len(bank), 4 * most + 1)  # spare ones, because the rules skip some
    samples = [random.Random(key).sample(range(len(bank)), depth) for key in keys]
    positions = np.array(samples, dtype=np.int64).reshape(len(keys), depth)
    nothing = np.zeros((len(keys), 0, bank.settings["dimensions"]), dtype=np.float32)
    scores = np.zeros(positions.shape)  # no search found them: only their scores to the query as a document are bounded
    columns = select(positions, scores, bank.vectors(positions), whole, own, nothing, most, config.max_score)
    rows = zip(positions, columns, counts, strict=True)
    return [[int(row[column]) for column in chosen if column >= 0][:count] for row, chosen, count in rows]


def coverage(neighbors: list[list[Neighbor]], config: RetrieveConfig, modalities: int = 2) -> dict[str, float]:
    """How many neighbors the queries have: share with all (``complete``), share with none (``empty``), mean number and mean score."""
    wanted = config.candidates_per_modality * modalities
    counts = np.array([len(found) for found in neighbors])
    scores = [neighbor.score for found in neighbors for neighbor in found]
    return {
        "complete": float((counts == wanted).mean()) if len(counts) else 0.0,
        "empty": float((counts == 0).mean()) if len(counts) else 0.0,
        "neighbors": float(counts.mean()) if len(counts) else 0.0,
        "score": float(np.mean(scores)) if scores else 0.0,
    }
