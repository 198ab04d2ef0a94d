"""Token shards, pretraining samples and batches."""

import numpy as np
import pytest
from tests_support import OBJECTIVE, make_documents

from cm3leon.data.batches import SampleStream
from cm3leon.data.sequences import PretrainingSamples, fit_body, sample_neighbors, sample_rng
from cm3leon.data.tokens import TokenStore, clear_tokens, write_tokens
from cm3leon.sequence.grammar import Vocabulary, check_grammar

VOCABULARY = Vocabulary(text_size=100, image_size=50, sentinels=8, tokens_per_image=16)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokens")
    assert write_tokens(directory, "train", make_documents(60), 16, shard_documents=25) == 60
    assert len(list(directory.glob("*.arrow"))) == 3
    return TokenStore(directory)


def samples(store, documents=(0.4, 0.3, 0.3), seed=0, context=128, **objective):
    neighbors = {name: [store.ids[(row + i) % len(store)] for i in (1, 2, 3)] for row, name in enumerate(store.ids)}
    return PretrainingSamples(store, store, neighbors, VOCABULARY, OBJECTIVE.model_copy(update=objective), documents, context, seed)


def test_documents_come_back_from_the_shards(store):
    for row, document in enumerate(make_documents(60)):
        for found in (store[row], store.by_id(document.id)):
            assert found.id == document.id and np.array_equal(found.codes, document.codes)
            assert all(np.array_equal(a, b) for a, b in zip(found.captions, document.captions, strict=True))


def test_shards_are_numbered_and_those_of_an_earlier_run_can_be_cleared(tmp_path):
    write_tokens(tmp_path, "train", make_documents(60), 16, shard_documents=10)
    clear_tokens(tmp_path)
    assert not TokenStore.holds(tmp_path, "train")
    write_tokens(tmp_path, "val", make_documents(5), 16, shard_documents=10)
    write_tokens(tmp_path, "train", make_documents(25), 16, shard_documents=10, first=1, every=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"train-0000{n}.arrow" for n in (1, 3, 5)] + ["val-00000.arrow"]
    assert (len(TokenStore(tmp_path)), len(TokenStore(tmp_path, ["val"]))) == (25, 5)


def test_unknown_documents_and_splits_are_errors(store, tmp_path):
    with pytest.raises(KeyError, match="no tokenized document"):
        store.by_id("f" * 16)
    with pytest.raises(FileNotFoundError, match="split 'val'"):
        TokenStore(tmp_path, ["val"])


def test_a_sample_depends_on_seed_epoch_and_id_alone(store):
    one, same, other = samples(store), samples(store), samples(store, seed=1)
    rows = list(range(20))
    forward = [one(3, row)[0].tokens.tolist() for row in rows]
    backward = [same(3, row)[0].tokens.tolist() for row in reversed(rows)][::-1]
    assert forward == backward
    assert forward != [other(3, row)[0].tokens.tolist() for row in rows]
    assert forward != [one(4, row)[0].tokens.tolist() for row in rows]


def test_every_sample_follows_the_grammar_and_fits(store):
    drawn = samples(store, context=80, mean_masks=2.0, segment_rate=0.3)
    for epoch in range(20):
        for row in range(len(store)):
            masked, weights, *_ = drawn(epoch, row)
            assert len(masked.tokens) <= 80
            check_grammar(masked.tokens, VOCABULARY)
            assert np.array_equal(weights > 0, masked.is_target)


def test_the_query_has_the_same_caption_with_and_without_retrieved_documents(store):
    alone, beside = (samples(store, shares, mean_masks=0, segment_rate=0) for shares in ((1.0,), (0.0, 0.0, 1.0)))
    for row in range(len(store)):
        query, whole = alone(0, row).masked.tokens, beside(0, row).masked.tokens
        assert len(whole) > len(query)
        assert np.array_equal(whole[1 - len(query) :], query[1:])


def test_text_ahead_of_an_image_has_the_text_weight_and_what_is_infilled_has_not(store):
    seen = set()
    drawn = samples(store, mean_masks=1.0, segment_rate=0.3, text_weight=0.25)
    for epoch in range(5):
        for row in range(len(store)):
            masked, weights, *_ = drawn(epoch, row)
            infilled = sum(stop - start + 2 for start, stop in masked.spans) + 1  # two marks a span, and <eos>
            tail = len(masked.tokens) - infilled
            assert masked.tail == tail
            expected = np.where((np.arange(len(weights)) < tail) & (masked.image_positions == 0), 0.25, 1.0)
            assert np.array_equal(weights, expected * masked.is_target)
            seen.add(masked.kind)
    assert seen == {"plain", "caption", "image", "spans"}


def test_number_of_retrieved_documents_follows_its_shares():
    counts = np.zeros(3)
    for number in range(3000):
        counts[len(sample_neighbors(["a", "b", "c"], [0.5, 0.3, 0.2], sample_rng(0, number, "1f")))] += 1
    assert np.allclose(counts / 3000, [0.5, 0.3, 0.2], atol=0.03)


def test_too_long_drops_retrieved_documents_then_text_never_an_image():
    image = VOCABULARY.image(range(16))
    one = [("text", VOCABULARY.text(range(10))), ("image", image)]
    assert len(fit_body([one, one, one], 200).segments) == 6
    assert len(fit_body([one, one, one], 60).segments) == 4
    cut = fit_body([one, one], 22)
    assert [s.length for s in cut.segments] == [4, 16]
    with pytest.raises(ValueError, match=r"raise pretrain\.model\.context by 3"):
        fit_body([one], 15)


def test_an_epoch_holds_every_document_once_and_batches_repeat(store):
    seen = []

    def draw(epoch, row):
        seen.append((epoch, row))
        return samples(store)(epoch, row)

    stream = SampleStream(draw, len(store), 4, seed=0)
    for step in range(32):
        batch = stream(step)
        assert batch.tokens.shape == batch.weights.shape == (1, batch.cu_seqlens[-1]) and len(batch.cu_seqlens) == 1 + 4
        assert not batch.weights[0, batch.cu_seqlens[:-1]].any()
    first = [row for epoch, row in seen if epoch == 0]
    assert sorted(first) == list(range(len(store)))
    again = SampleStream(samples(store), len(store), 4, seed=0)
    assert again(17).tokens.tolist() == stream(17).tokens.tolist()
