"""The memory bank: search compared with exhaustive search, saving, memory, and errors."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cm3leon.retrieval.index import BANK_COLUMNS, MemoryBank
from cm3leon.retrieval.vectors import document_vectors, normalize


def bank_inputs(count: int = 200, width: int = 16, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    documents = pd.DataFrame({name: [f"{name} {i}" for i in range(count)] for name in BANK_COLUMNS})
    return documents, normalize(rng.normal(size=(count, width))), normalize(rng.normal(size=(count, width)))


def test_document_vectors_are_normalized_means() -> None:
    _, text, image = bank_inputs()
    vectors = document_vectors(text, image)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(200), abs=1e-6)
    assert vectors == pytest.approx(normalize((text + image) / 2), abs=1e-6)


@pytest.mark.parametrize(("kind", "least"), [("auto", 1.0), ("flat", 1.0), ("hnsw", 0.99), ("ivf", 0.9)])
def test_search_finds_the_most_similar(kind: str, least: float) -> None:
    documents, text, image = bank_inputs()
    bank = MemoryBank.build(documents, text, image, kind, "f")
    queries = normalize(np.random.default_rng(1).normal(size=(40, 16)))
    scores, positions = bank.search(queries, 5)
    assert scores.shape == positions.shape == (40, 5)
    exact = queries @ bank.vectors(np.arange(200)).T
    assert np.mean([len(set(p) & set(np.argsort(-e)[:5])) / 5 for p, e in zip(positions, exact, strict=True)]) >= least
    found = positions >= 0
    assert scores[found] == pytest.approx(np.take_along_axis(exact, positions, axis=1)[found], abs=1e-5)
    assert (np.diff(scores) <= 0)[found[:, 1:]].all()


def test_a_search_for_more_than_there_are_finds_all() -> None:
    bank = MemoryBank.build(*bank_inputs(count=3), "flat", "f")
    _, positions = bank.search(np.ones((2, 16)), 10)
    assert sorted(positions[0]) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_a_bank_can_be_saved_where_it_was_loaded_from(kind: str, tmp_path: Path) -> None:
    MemoryBank.build(*bank_inputs(), kind, "f").save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    bank = MemoryBank.load(tmp_path)
    bank.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert np.array_equal(bank.search(bank.vectors(np.arange(3)), 1)[1][:, 0], [0, 1, 2])


MAPS = Path("/proc/self/maps")


@pytest.mark.skipif(not MAPS.exists(), reason="reads Linux's table of mapped files")
@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_index_and_embeddings_of_a_loaded_bank_are_mapped_and_not_read(kind: str, tmp_path: Path) -> None:
    MemoryBank.build(*bank_inputs(), kind, "f").save(tmp_path)
    assert str(tmp_path) not in MAPS.read_text()
    bank = MemoryBank.load(tmp_path)
    mapped = MAPS.read_text()
    assert all(str(tmp_path / name) in mapped for name in ("index.faiss", "text_embeddings.npy", "image_embeddings.npy"))
    assert len(bank) == 200


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_saving_and_loading(kind: str, tmp_path: Path) -> None:
    bank = MemoryBank.build(*bank_inputs(), kind, "fingerprint")
    bank.save(tmp_path / "a")
    MemoryBank.build(*bank_inputs(), kind, "fingerprint").save(tmp_path / "b")
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), f"{file.name} is not deterministic"
    loaded = MemoryBank.load(tmp_path / "a")
    assert loaded.documents.equals(bank.documents)
    query = normalize(np.random.default_rng(2).normal(size=(4, 16)))
    for before, after in zip(bank.search(query, 3), loaded.search(query, 3), strict=True):
        assert np.array_equal(before, after)
    assert np.array_equal(loaded.vectors(np.arange(5)), bank.vectors(np.arange(5)))
    loaded.check_encoder("fingerprint")
    with pytest.raises(ValueError, match="was made with encoder fingerprint"):
        loaded.check_encoder("other")


def test_loading_from_an_empty_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cm3leon index"):
        MemoryBank.load(tmp_path)


def test_documents_that_cannot_be_retrieved_are_refused() -> None:
    documents, text, image = bank_inputs(count=4)
    with pytest.raises(ValueError, match="empty"):
        MemoryBank.build(documents.iloc[:0], text[:0], image[:0], "flat", "f")
    with pytest.raises(ValueError, match="occurs twice"):
        MemoryBank.build(documents.assign(id="same"), text, image, "flat", "f")
    with pytest.raises(ValueError, match="caption"):
        MemoryBank.build(documents.assign(caption=["a", " ", "b", "c"]), text, image, "flat", "f")
    with pytest.raises(ValueError, match="inconsistent"):
        MemoryBank.build(documents.iloc[:3], text, image, "flat", "f")
