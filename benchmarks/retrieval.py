"""Neighbor search on a CPU: python benchmarks/retrieval.py [--documents 100000] [--dimensions 512] [--hnsw]

Exact search by the number of queries searched together; recall@10 and time of approximate search by its width; what
``index.kind: auto`` chooses. Times are milliseconds a query for the 256 nearest, median and range of three.

The documents are synthetic: each is a subject, one of its kinds, and variation of its own, in 64 independent directions; its text and its
image vary around it, and texts and images are apart as CLIP's are. Real collections differ in the width that a recall takes.
``--hnsw`` measures that kind too; its graph is built on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from cm3leon.retrieval import faiss_index
from cm3leon.retrieval.strategy import search_batch
from cm3leon.retrieval.vectors import chunks, normalize

DIRECTIONS, SUBJECTS, KINDS = 64, 200, 5000
DEPTH, TARGET = 256, 2_000_000
"""Results of a query; documents that times are extrapolated to."""


def synthetic(count: int, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Text and image embeddings of documents, float16 (n, d)."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    to_space, offsets = normal(DIRECTIONS, dimensions), normal(2, dimensions) * DIRECTIONS**0.5
    subjects, kinds = normal(SUBJECTS, DIRECTIONS), normal(KINDS, DIRECTIONS)
    embeddings = np.empty((2, count, dimensions), dtype=np.float16)
    for rows in chunks(count):
        size = rows.stop - rows.start
        content = subjects[rng.integers(SUBJECTS, size=size)] + kinds[rng.integers(KINDS, size=size)] + normal(size, DIRECTIONS)
        for modality, offset in enumerate(offsets):
            embeddings[modality, rows] = normalize((content + 0.7 * normal(size, DIRECTIONS)) @ to_space + offset)
    return embeddings[0], embeddings[1]


def milliseconds(index: Any, queries: np.ndarray, batch: int) -> list[float]:
    """Milliseconds a query, three times: all queries, ``batch`` at a time."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        for rows in chunks(len(queries), batch):
            index.search(queries[rows], DEPTH)
        found.append((time.perf_counter() - start) / len(queries) * 1e3)
    return found


def shown(times: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(times):.2f} ({min(times):.2f}–{max(times):.2f})"


def time_exact(text: np.ndarray, image: np.ndarray, queries: np.ndarray) -> None:
    """Print the time of exact search by batch, and that of a whole large collection."""
    index, _ = faiss_index.build_index(text, image, "flat")
    best = search_batch(text.shape[1])
    print("| exact search, queries together | ms a query |\n|---|---|")
    for batch in sorted({1, 32, 128, 256, 1024, best}):
        times = milliseconds(index, queries[: max(32, batch)], batch)
        print(f"| {batch} | {shown(times)} |", flush=True)
        if batch == best:
            hours = 2 * TARGET * statistics.median(times) * TARGET / len(text) / 3.6e6
    print(f"\nextrapolated to {TARGET:,} documents, each searched by text and by image, {best} together: {hours:.1f} h\n")


def time_approximate(kind: str, text: np.ndarray, image: np.ndarray, queries: np.ndarray) -> None:
    """Print recall and time of a kind of index by the width of the search."""
    sampled = faiss_index.sampled_queries(text, image)
    least = faiss_index.exact_scores(sampled, text, image)
    start = time.perf_counter()
    index, name, widths = faiss_index.build_hnsw(text, image) if kind == "hnsw" else faiss_index.build_ivf(text, image, 1.0)
    print(f"| {kind}, built in {time.perf_counter() - start:.0f} s | recall@10 | ms a query |\n|---|---|---|")
    for width in [1 << power for power in range(13) if widths[0] <= 1 << power <= widths[-1]]:
        faiss_index.set_width(index, name, width)
        recall = faiss_index.measure_recall(index, sampled, least)
        label = f"nprobe {width} of {index.nlist} lists" if kind == "ivf" else f"efSearch {width}"
        print(f"| {label} | {recall:.3f} | {shown(milliseconds(index, queries, search_batch(text.shape[1])))} |", flush=True)
        if recall > 0.98:
            break
    print()


def main(count: int, dimensions: int, kinds: list[str]) -> None:
    """Print the tables."""
    text, image = synthetic(count, dimensions)
    queries = np.concatenate(faiss_index.sampled_queries(text, image))
    queries = queries[np.random.default_rng(0).permutation(len(queries))]
    print(f"{count:,} documents, {dimensions} dimensions, {DEPTH} nearest\n")
    time_exact(text, image, queries)
    for kind in kinds:
        time_approximate(kind, text, image, queries)
    start = time.perf_counter()
    _, settings = faiss_index.build_index(text, image, "auto")
    print(f"auto: {settings}, built and measured in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--hnsw", action="store_true")
    options = parser.parse_args()
    main(options.documents, options.dimensions, ["ivf", "hnsw"] if options.hnsw else ["ivf"])
