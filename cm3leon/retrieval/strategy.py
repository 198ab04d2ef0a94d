"""Which documents go before a query: the paper's rules on top of nearest-neighbor search (section 2.1; RA-CM3, section 3.2).

Candidates come from each modality of the query, by its text and by its image, in order of relevance. A candidate is skipped when its score
to the query, or to a candidate already taken, is above ``max_score``; the query itself is never taken. The memory bank holds only
documents with text and image, of the train split.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cm3leon.config.schema import RetrieveConfig
from cm3leon.retrieval.index import MemoryBank, document_vectors

TEXT, IMAGE = "text", "image"
_VALUES = 1 << 24  # most floats gathered at once


@dataclass(frozen=True)
class Neighbor:
    """A retrieved document: its position in the bank, its score to the query, and the modality of the query that found it."""

    position: int
    score: float
    modality: str


def drop_words(text: str, rate: float, seed: int, key: str) -> str:
    """``text`` without a ``rate`` share of its words, rounded; one word always stays. The same for the same seed and key.

    The paper drops tokens; words keep the text readable to an encoder whose own tokens are other ones.
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
    """Choose up to ``count`` candidates for each query by the rules above. Pure; ``q`` queries, ``k`` candidates each.

    Args:
        positions: int ``(q, k)``, candidates in the bank, most relevant first; -1: none.
        scores: ``(q, k)``, of the candidates to the query that found them.
        candidates: ``(q, k, d)`` unit document vectors of the candidates.
        query: ``(q, d)`` unit vectors of the query as a document.
        own: int ``(q,)``, the query's own position in the bank; -1: not in it.
        taken: ``(q, t, d)`` document vectors already taken; a row of zeros excludes nothing.
        count: candidates to take.
        max_score: a candidate with a higher score to query, or to one taken, is skipped.

    Returns:
        int ``(q, count)``: columns of ``positions``, in the order taken; -1 where nothing more passed.
    """
    allowed = (positions >= 0) & (positions != own[:, None]) & (scores <= max_score)
    allowed &= np.einsum("qkd,qd->qk", candidates, query) <= max_score
    for t in range(taken.shape[1]):
        allowed &= np.einsum("qkd,qd->qk", candidates, taken[:, t]) <= max_score
    chosen = np.full((len(positions), count), -1)
    rows = np.arange(len(positions))
    for i in range(count if positions.shape[1] else 0):
        column = allowed.argmax(axis=1)
        found = allowed[rows, column]
        chosen[found, i] = column[found]
        allowed[rows, column] = False  # also where the bound would let a document stand beside itself
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
    """Neighbors of queries: first those found by text, then those found by image, each at most ``candidates_per_modality``.

    Args:
        text, image: unit vectors ``(q, d)`` of the queries' texts and images; one may be missing (a prompt has no image).
        whole: unit vectors ``(q, d)`` of the queries as documents, to which no neighbor may be too like; by default made of the two.
            Another, where ``text`` is of less than the whole text.
        own: positions of the queries in the bank, -1 for others; None: no query is in it.

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
    for part in _chunks(count, max(1, _VALUES // (depth * bank.settings["dimensions"]))):
        result += _find_chunk(bank, config, [(name, vectors[part]) for name, vectors in by_modality], whole[part], own[part], depth)
    return result


def _find_chunk(
    bank: MemoryBank, config: RetrieveConfig, by_modality: list[tuple[str, np.ndarray]], query: np.ndarray, own: np.ndarray, depth: int
) -> list[list[Neighbor]]:
    found: list[list[Neighbor]] = [[] for _ in own]
    taken, taken_positions = np.zeros((len(own), 0, query.shape[1]), dtype=np.float32), np.full((len(own), 0), -1)
    rows = np.arange(len(own))[:, None]
    for name, vectors in by_modality:
        scores, positions = bank.search(vectors, depth)
        candidates = bank.vectors(positions)
        repeated = (positions[:, :, None] == taken_positions[:, None, :]).any(axis=2)
        open_positions = np.where(repeated, -1, positions)
        columns = select(open_positions, scores, candidates, query, own, taken, config.candidates_per_modality, config.max_score)
        present = columns >= 0
        for row, slot in zip(*np.nonzero(present), strict=True):
            column = columns[row, slot]
            found[row].append(Neighbor(int(positions[row, column]), float(scores[row, column]), name))
        taken = np.concatenate([taken, candidates[rows, columns] * present[:, :, None]], axis=1)
        taken_positions = np.concatenate([taken_positions, np.where(present, positions[rows, columns], -1)], axis=1)
    return found


def draw_random(
    bank: MemoryBank,
    config: RetrieveConfig,
    *,
    whole: np.ndarray,
    own: np.ndarray,
    counts: Sequence[int],
    keys: Sequence[str],
) -> list[list[int]]:
    """Positions of ``counts`` documents for each query, drawn at random under the same rules: what retrieved ones are compared with.

    Args:
        whole, own: as in :func:`find`.
        keys: of each query; the same key draws the same.
    """
    most = max(counts, default=0)
    depth = min(len(bank), 4 * most + 1)
    positions = np.array([random.Random(key).sample(range(len(bank)), depth) for key in keys], dtype=np.int64).reshape(len(keys), depth)
    nothing = np.zeros((len(keys), 0, bank.settings["dimensions"]), dtype=np.float32)
    scores = np.zeros(positions.shape)  # nothing found them; the bound on likeness to the query is what holds
    columns = select(positions, scores, bank.vectors(positions), whole, own, nothing, most, config.max_score)
    rows = zip(positions, columns, counts, strict=True)
    return [[int(row[column]) for column in chosen if column >= 0][:count] for row, chosen, count in rows]


def coverage(neighbors: list[list[Neighbor]], config: RetrieveConfig, modalities: int = 2) -> dict[str, float]:
    """How well queries were served: share with all candidates, share with none, mean number and mean score."""
    wanted = config.candidates_per_modality * modalities
    counts = np.array([len(group) for group in neighbors])
    scores = [neighbor.score for group in neighbors for neighbor in group]
    return {
        "complete": float((counts == wanted).mean()) if len(counts) else 0.0,
        "empty": float((counts == 0).mean()) if len(counts) else 0.0,
        "neighbors": float(counts.mean()) if len(counts) else 0.0,
        "score": float(np.mean(scores)) if scores else 0.0,
    }
