"""The choice of a FAISS index: recall compared with exhaustive search, width, refusal, and what ``auto`` takes."""

import faiss
import numpy as np
import pytest

from cm3leon.retrieval import faiss_index, vectors
from cm3leon.retrieval.faiss_index import build_index
from cm3leon.retrieval.vectors import document_vectors, normalize
from cm3leon.utils.errors import UserError


def embeddings(count: int, clusters: int, spread: float, width: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    content = rng.normal(size=(clusters, width))[rng.integers(clusters, size=count)] + spread * rng.normal(size=(count, width))
    text, image = (normalize(content + spread / 4 * rng.normal(size=(count, width))).astype(np.float16) for _ in range(2))
    return text, image


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """3,000 documents are many."""
    monkeypatch.setattr(faiss_index, "MIN_APPROXIMATE", 3000)


def by_exhaustion(index: object, text: np.ndarray, image: np.ndarray) -> float:
    """The lower of the two recalls@10, of all texts and of all images."""
    documents = document_vectors(text, image)
    found = []
    for queries in (np.float32(text), np.float32(image)):
        nearest = np.argsort(-(queries @ documents.T), axis=1)[:, :10]
        _, positions = index.search(queries, 10)  # type: ignore[attr-defined]
        found.append(float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(nearest, positions, strict=True)])))
    return min(found)


def test_recall_is_that_of_exhaustive_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "CHUNK", 701)
    text, image = embeddings(1000, 1000, 1.0)
    index, _ = build_index(text, image, "ivf")
    queries = faiss_index.sampled_queries(text, image)
    least = faiss_index.exact_scores(queries, text, image)
    for probes in (1, 4, index.nlist):
        faiss_index.set_width(index, "nprobe", probes)
        assert faiss_index.measure_recall(index, queries, least) == pytest.approx(by_exhaustion(index, text, image), abs=1e-3)


@pytest.mark.parametrize(("kind", "name"), [("ivf", "nprobe"), ("hnsw", "efSearch")])
def test_a_search_is_as_wide_as_the_recall_takes(kind: str, name: str) -> None:
    text, image = embeddings(2000, 2000, 1.0)
    index, settings = build_index(text, image, kind)
    assert settings["kind"] == kind and settings["recall"] >= 0.95
    assert by_exhaustion(index, text, image) >= 0.94  # the recall was measured with half of them
    if kind == "ivf":
        assert index.nprobe == settings[name] > 1
        index.nprobe //= 2
        assert by_exhaustion(index, text, image) < 0.95


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_too_low_a_recall_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_index, "MIN_RECALL", 1.01)
    with pytest.raises(UserError, match=rf"index\.kind {kind}: recall@10 is [01]\.\d+ .* below 1\.01, .* auto, or to flat"):
        build_index(*embeddings(300, 300, 1.0), kind)


def test_auto_is_exact_for_few_documents() -> None:
    index, settings = build_index(*embeddings(2999, 100, 0.1), "auto")
    assert settings == {"kind": "flat", "recall": 1.0} and isinstance(index, faiss.IndexFlat)


def test_auto_is_approximate_where_few_lists_are_enough(large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_index, "MAX_PROBED", 0.1)
    text, image = embeddings(3000, 100, 0.05)
    index, settings = build_index(text, image, "auto")
    assert settings["kind"] == "ivf" and settings["nprobe"] <= 0.1 * index.nlist
    assert by_exhaustion(index, text, image) >= 0.94


def test_auto_is_exact_where_many_lists_would_have_to_be_searched(large: None) -> None:
    text, image = embeddings(3000, 3000, 1.0)
    index, settings = build_index(text, image, "auto")
    assert settings == {"kind": "flat", "recall": 1.0} and by_exhaustion(index, text, image) == 1


def test_chunks_give_the_same_exact_index(monkeypatch: pytest.MonkeyPatch) -> None:
    text, image = embeddings(500, 500, 1.0)
    whole, _ = build_index(text, image, "flat")
    monkeypatch.setattr(vectors, "CHUNK", 7)
    in_chunks, _ = build_index(text, image, "flat")
    assert np.array_equal(faiss.serialize_index(whole), faiss.serialize_index(in_chunks))
