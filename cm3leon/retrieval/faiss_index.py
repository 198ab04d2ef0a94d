"""The FAISS index of the memory bank: exact, or approximate with a recall that was measured.

The inner product is searched. An index is built a chunk of vectors at a time; it alone holds all of them as float32, once. The same
vectors give the same index, byte for byte, on one machine.

Shapes: n documents, q queries, k results, d dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

from cm3leon.retrieval.vectors import document_chunks, document_vectors
from cm3leon.utils.errors import UserError

Kind = Literal["auto", "flat", "ivf", "hnsw"]

MIN_APPROXIMATE = 500_000
"""Documents from which ``auto`` tries an approximate index. For so many, exact search by text and by image takes half an hour on two cores
at 512 dimensions; the time grows with the square of the number."""
MAX_PROBED = 1 / 32
"""Most lists that ``auto`` lets a query search, as a share of all. FAISS compares a query with the vectors of a list one by one; exact
search multiplies matrices, and takes a twentieth of the time for each vector, so that from 1/20 of the lists on it is the faster
(``benchmarks/retrieval.py``)."""
MIN_RECALL, RECALL_AT, RECALL_DOCUMENTS = 0.95, 10, 1000
"""Least recall@10 against exact search, and the number of documents whose texts and images are the queries that it is measured with."""
MAX_EF_SEARCH = 4096
TRAINING_VECTORS = 64
"""Vectors a list that the lists' centroids are found from; FAISS asks for 39 or more."""


def build_index(text: np.ndarray, image: np.ndarray, kind: Kind) -> tuple[Any, dict[str, Any]]:
    """A FAISS index of the documents with these embeddings, and what it is, for the bank's settings.

    ``flat`` is exact. ``ivf`` and ``hnsw`` are approximate: their search is widened until the recall is at least :data:`MIN_RECALL`.
    ``auto`` takes ``ivf`` for :data:`MIN_APPROXIMATE` documents or more if that is faster than exact search, else ``flat``.

    Args:
        text, image: unit vectors ``(n, d)``, in memory or memory-mapped.

    Returns:
        The index, and the settings ``kind``, ``recall`` and, of an approximate index, the width of the search: ``nprobe`` or ``efSearch``.

    Raises:
        UserError: if the recall stays lower with the widest search.
    """
    if kind == "flat" or (kind == "auto" and len(text) < MIN_APPROXIMATE):
        return _flat(text, image), {"kind": "flat", "recall": 1.0}
    index, name, widths = build_hnsw(text, image) if kind == "hnsw" else build_ivf(text, image, MAX_PROBED if kind == "auto" else 1.0)
    queries = sampled_queries(text, image)
    least = exact_scores(queries, text, image)
    recall = width = 0.0
    for width in widths:
        set_width(index, name, width)
        recall = measure_recall(index, queries, least)
        if recall >= MIN_RECALL:
            return index, {"kind": "hnsw" if kind == "hnsw" else "ivf", "recall": recall, name: width}
    if kind == "auto":
        del index
        return _flat(text, image), {"kind": "flat", "recall": 1.0}
    raise UserError(
        f"index.kind {kind}: recall@{RECALL_AT} is {recall:.3f} against exact search, below {MIN_RECALL}, even at {name} {width}; "
        "set index.kind to auto, or to flat, which is exact"
    )


def _filled(index: Any, vectors: Iterable[np.ndarray]) -> Any:
    for chunk in vectors:
        index.add(chunk)
    return index


def _flat(text: np.ndarray, image: np.ndarray) -> Any:
    import faiss

    return _filled(faiss.IndexFlatIP(text.shape[1]), document_chunks(text, image))


def build_ivf(text: np.ndarray, image: np.ndarray, most: float) -> tuple[Any, str, list[int]]:
    """An inverted file, the name of its search parameter, and the values to try: up to a share ``most`` of the lists."""
    import faiss

    count, width = text.shape
    lists = max(1, min(int(4 * count**0.5), count // 39))
    sample = np.sort(np.random.default_rng(0).permutation(count)[: lists * TRAINING_VECTORS])
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    index.train(document_vectors(text[sample], image[sample]))
    return _filled(index, document_chunks(text, image)), "nprobe", list(_widths(1, max(1, int(lists * most))))


def build_hnsw(text: np.ndarray, image: np.ndarray) -> tuple[Any, str, list[int]]:
    """As :func:`build_ivf`, a graph of neighbors."""
    import faiss

    index = faiss.IndexHNSWFlat(text.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 200
    threads = faiss.omp_get_max_threads()  # one thread: the graph depends on the order of insertion
    faiss.omp_set_num_threads(1)
    try:
        _filled(index, document_chunks(text, image))
    finally:
        faiss.omp_set_num_threads(threads)
    return index, "efSearch", list(_widths(16, MAX_EF_SEARCH))


def _widths(first: int, last: int) -> Iterator[int]:
    """``first``, then each a quarter larger than the one before, up to ``last``."""
    value = first
    while value < last:
        yield value
        value += max(1, value // 4)
    yield last


def set_width(index: Any, name: str, value: int) -> None:
    """Set how wide an approximate index is searched: ``nprobe`` lists, or ``efSearch`` candidates."""
    import faiss

    faiss.ParameterSpace().set_index_parameter(index, name, value)


# --- recall ----------------------------------------------------------------------------------------------------------


def sampled_queries(text: np.ndarray, image: np.ndarray) -> list[np.ndarray]:
    """Queries as ``retrieve`` has them: the text vectors ``(q, d)`` of sampled documents, and their image vectors."""
    sample = np.sort(np.random.default_rng(0).permutation(len(text))[:RECALL_DOCUMENTS])
    return [np.asarray(vectors[sample], dtype=np.float32) for vectors in (text, image)]


def exact_scores(queries: list[np.ndarray], text: np.ndarray, image: np.ndarray) -> list[np.ndarray]:
    """For each kind of query the score ``(q,)`` of the :data:`RECALL_AT`-th best document, by exact search."""
    import faiss

    best = [np.empty((len(vectors), 0), dtype=np.float32) for vectors in queries]
    for chunk in document_chunks(text, image):
        for number, vectors in enumerate(queries):
            scores, _ = faiss.knn(vectors, chunk, min(RECALL_AT, len(chunk)), metric=faiss.METRIC_INNER_PRODUCT)
            best[number] = -np.sort(-np.concatenate([best[number], scores], axis=1), axis=1)[:, :RECALL_AT]
    return [scores[:, -1] for scores in best]


def measure_recall(index: Any, queries: list[np.ndarray], least: list[np.ndarray]) -> float:
    """Recall@10, 0 to 1, that of texts or that of images, whichever is lower.

    A document that is found counts if it scores as high as the tenth best by exact search, so that copies of a document do not matter.

    Args:
        queries: of :func:`sampled_queries`.
        least: of :func:`exact_scores`.
    """
    recalls = []
    for vectors, scores in zip(queries, least, strict=True):
        wanted = min(RECALL_AT, index.ntotal)
        found, positions = index.search(vectors, wanted)
        right = (positions >= 0) & (found >= scores[:, None] - 1e-5)  # rounding: not all searches sum in the same order
        recalls.append(float(right.mean()))
    return min(recalls)
