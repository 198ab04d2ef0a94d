"""The paper's rules for retrieved documents, for any bank and any query, compared with a plain loop."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3leon.config.schema import RetrieveConfig
from cm3leon.retrieval import strategy
from cm3leon.retrieval.index import BANK_COLUMNS, MemoryBank
from cm3leon.retrieval.vectors import document_vectors, normalize


def bank_of(count: int, seed: int, spread: float, width: int = 6) -> MemoryBank:
    """Documents around a few centers; a small ``spread`` makes near-duplicates."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(max(1, count // 5), width))[rng.integers(max(1, count // 5), size=count)]
    text, image = (normalize(centers + spread * rng.normal(size=(count, width))) for _ in range(2))
    rows = [{**dict.fromkeys(BANK_COLUMNS, "x"), "id": f"doc{i}"} for i in range(count)]
    return MemoryBank.build(pd.DataFrame(rows), text, image, "flat", "0")


def by_loop(bank: MemoryBank, config: RetrieveConfig, text: np.ndarray, image: np.ndarray, own: int) -> list[tuple[int, str]]:
    """The rules, one candidate at a time."""
    vectors = document_vectors(bank.text, bank.image)
    query = document_vectors(text[None], image[None])[0]
    taken: list[tuple[int, str]] = []
    for name, vector in (("text", text), ("image", image)):
        scores = vectors @ vector
        found = 0
        for position in np.argsort(-scores, kind="stable")[: config.search_depth]:
            if found == config.candidates_per_modality:
                break
            others = [vectors[position] @ vectors[p] for p, _ in taken]
            if position == own or position in [p for p, _ in taken]:
                continue
            if max([scores[position], vectors[position] @ query, *others]) > config.max_score:
                continue
            taken.append((int(position), name))
            found += 1
    return taken


@settings(max_examples=60)
@given(
    count=st.integers(1, 60),
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.05, 0.3, 1.0]),
    max_score=st.sampled_from([0.5, 0.9, 1.1]),
    per=st.integers(1, 3),
    depth=st.sampled_from([1, 5, 256]),
)
def test_the_rules_hold_and_agree_with_a_loop(count: int, seed: int, spread: float, max_score: float, per: int, depth: int) -> None:
    bank = bank_of(count, seed, spread)
    config = RetrieveConfig(candidates_per_modality=per, max_score=max_score, search_depth=depth)
    vectors = bank.vectors(np.arange(count))
    own = np.arange(min(count, 12))
    text, image = np.asarray(bank.text[own], dtype=np.float32), np.asarray(bank.image[own], dtype=np.float32)
    found = strategy.find(bank, config, text=text, image=image, own=own)
    for query, neighbors in enumerate(found):
        positions = [n.position for n in neighbors]
        assert own[query] not in positions
        assert len(set(positions)) == len(positions)
        assert all(sum(n.modality == m for n in neighbors) <= per for m in ("text", "image"))
        assert all(n.score <= max_score for n in neighbors)
        between = vectors[positions] @ vectors[positions].T
        assert (between[~np.eye(len(positions), dtype=bool)] <= max_score + 1e-5).all()
        assert [(n.position, n.modality) for n in neighbors] == by_loop(bank, config, text[query], image[query], int(own[query]))


def test_an_exact_copy_of_the_query_is_skipped() -> None:
    text, image = np.eye(4, 8), np.eye(4, 8, k=4)
    rows = pd.DataFrame([{**dict.fromkeys(BANK_COLUMNS, "x"), "id": f"doc{i}"} for i in range(6)])
    bank = MemoryBank.build(rows, np.concatenate([text, text[:2]]), np.concatenate([image, image[:2]]), "flat", "0")
    config = RetrieveConfig(candidates_per_modality=5)
    found = strategy.find(bank, config, text=np.float32(text[:1]), image=np.float32(image[:1]), own=np.array([0]))
    positions = {n.position for n in found[0]}
    assert not positions & {0, 4}  # 4 is the copy of 0
    assert len(positions & {1, 5}) == 1  # of two copies of one document one is taken


def test_candidates_behind_many_copies_are_found() -> None:
    """The rules are applied to the first candidates first; these are all copies of the query."""
    count = 3 * strategy.FIRST_CANDIDATES
    text, image = np.tile(np.eye(1, 8), (count, 1)), np.tile(np.eye(1, 8, k=4), (count, 1))
    text[-2:], image[-2:] = np.eye(8)[2:4] + 0.1, np.eye(8)[6:8] + 0.1
    rows = pd.DataFrame([{**dict.fromkeys(BANK_COLUMNS, "x"), "id": f"doc{i}"} for i in range(count)])
    bank = MemoryBank.build(rows, normalize(text), normalize(image), "flat", "0")
    found = strategy.find(bank, RetrieveConfig(), text=np.float32(text[:2]), image=np.float32(image[:2]), own=np.array([0, 1]))
    assert [{n.position for n in neighbors} for neighbors in found] == [{count - 2, count - 1}] * 2


@pytest.mark.parametrize("width", [64, 512])
def test_queries_are_searched_in_batches_for_which_faiss_multiplies_matrices(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_of(300, 0, 1.0, width)
    sizes: list[int] = []
    search = bank.search

    def counted(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        sizes.append(len(vectors))
        return search(vectors, k)

    monkeypatch.setattr(bank, "search", counted)
    queries = np.tile(np.float32(bank.text), (15, 1))[:4200]
    strategy.find(bank, RetrieveConfig(), text=queries)
    assert sum(sizes) == 4200 and all(size * width >= 128_000 and size >= 512 for size in sizes[:-1])


def test_a_prompt_without_image_gets_text_neighbors() -> None:
    bank = bank_of(30, 0, 1.0)
    found = strategy.find(bank, RetrieveConfig(), text=np.asarray(bank.text[:3], dtype=np.float32))
    assert all(n.modality == "text" for group in found for n in group)
    assert [len(group) for group in found] == [2, 2, 2]
    with pytest.raises(ValueError, match="text or an image"):
        strategy.find(bank, RetrieveConfig())


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_of(50, 1, 0.5)
    text = np.asarray(bank.text, dtype=np.float32)
    whole = strategy.find(bank, RetrieveConfig(), text=text, own=np.arange(50))
    monkeypatch.setattr(strategy, "_MAX_FLOATS", 1)
    in_chunks = strategy.find(bank, RetrieveConfig(), text=text, own=np.arange(50))
    assert [[n.position for n in group] for group in in_chunks] == [[n.position for n in group] for group in whole]


@settings(max_examples=60)
@given(st.lists(st.sampled_from(["a", "red", "circle", "left"]), max_size=20), st.floats(0, 0.99), st.integers(0, 5), st.text(max_size=5))
def test_dropped_words_are_a_share_and_the_rest_keeps_its_order(words: list[str], rate: float, seed: int, key: str) -> None:
    text = " ".join(words)
    kept = strategy.drop_words(text, rate, seed, key).split()
    assert len(kept) == (len(words) - min(round(rate * len(words)), len(words) - 1) if words else 0)
    remaining = iter(words)
    assert all(word in remaining for word in kept)  # in order
    assert strategy.drop_words(text, rate, seed, key).split() == kept


def test_dropped_words_differ_by_document() -> None:
    text = "a large red circle left of a small blue square on a white background"
    assert len({strategy.drop_words(text, 0.2, 0, str(i)) for i in range(20)}) > 5


def test_coverage_of_parts_is_that_of_the_whole() -> None:
    n = strategy.Neighbor(0, 0.5, "text")
    coverage = strategy.Coverage(wanted=4)
    assert coverage.metrics == {"complete": 0, "empty": 0, "neighbors": 0, "score": 0}
    coverage.add([[n, n, n, n], [n]])
    coverage.add([[], []])
    assert coverage.metrics == {"complete": 0.25, "empty": 0.5, "neighbors": 1.25, "score": 0.5}
