"""Packed samples: nothing lost, nothing leaks, the same for any division among processes and after a restart."""

import json
import multiprocessing
import subprocess
import sys
from collections import Counter
from contextlib import closing

import numpy as np
import pytest
import torch
from tests_support import OBJECTIVE, TensorSizes, decoder_spec, make_documents

from cm3leon.data.batches import SampleStream, TokenStream, collate, pack, share_of
from cm3leon.data.epochs import Weights
from cm3leon.data.prefetch import Shares, prefetched
from cm3leon.data.sequences import PretrainingSamples
from cm3leon.data.tokens import TokenStore, write_tokens
from cm3leon.models import kernels
from cm3leon.models.decoder import Decoder
from cm3leon.sequence.grammar import EOS, Vocabulary, check_grammar

VOCABULARY = Vocabulary(text_size=100, image_size=50, sentinels=8, tokens_per_image=16)
LENGTH = 160


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokens")
    write_tokens(directory, "train", make_documents(40), 16, 100)
    store = TokenStore(directory)
    neighbors = dict.fromkeys(store.ids, store.ids[:3])
    return PretrainingSamples(store, store, neighbors, VOCABULARY, OBJECTIVE, [0.5, 0.5], 80, 0)


def packed(samples, batch_size=4):
    return TokenStream(samples, len(samples), batch_size, 0, LENGTH)


def tokens_of(samples):
    return [sample.masked.tokens.tolist() for sample in samples]


def test_every_sample_is_used_once_whole_and_in_order(samples):
    stream = packed(samples)
    found = [tokens for step in range(10) for tokens in tokens_of(stream.samples(step))]
    assert found == tokens_of(stream._samples[position] for position in range(len(found)))
    for tokens in found:
        check_grammar(np.array(tokens), VOCABULARY)


@pytest.mark.parametrize("kind", [TokenStream, SampleStream])
def test_a_stream_has_a_document_as_often_as_its_weight_says(samples, kind):
    def stream(weights):
        size, length = len(samples), [LENGTH] if kind is TokenStream else []
        return kind(samples, size, 10, 0, *length, weights)

    ids = samples.store.ids
    weights = Weights.of_documents(ids, {name: 2.0 if row < 10 else 0.25 for row, name in enumerate(ids)}, 0)
    weighted = stream(weights)
    counts: Counter[str] = Counter()
    for step in range(16):
        counts.update(sample.documents[-1] for sample in weighted.samples(step))
    seen = sum(counts.values()) / weights.values.sum()  # epochs
    assert all(abs(counts[name] - seen * weight) < 1 + weight for name, weight in zip(ids, weights.values, strict=True))
    ones, plain = stream(Weights.of_documents(ids, dict.fromkeys(ids, 1.0), 0)), stream(None)
    assert [tokens_of(ones.samples(step)) for step in range(20)] == [tokens_of(plain.samples(step)) for step in range(20)]


def test_steps_use_up_their_budget_of_tokens(samples):
    """What is trained on is within one sample of the budget after any number of steps."""
    stream, used = packed(samples), 0
    for step in range(10):
        used += sum(map(len, tokens_of(stream.samples(step))))
        assert (step + 1) * 4 * LENGTH - 80 < used <= (step + 1) * 4 * LENGTH


def test_packed_samples_follow_one_another_without_padding(samples):
    own = packed(samples).samples(0)
    batch = pack(own)
    assert batch.tokens[0].tolist() == [token for sample in tokens_of(own) for token in sample]
    starts = batch.cu_seqlens.tolist()
    assert starts == [0, *np.cumsum([len(sample.masked.tokens) for sample in own])]
    assert batch.positions[0, starts[:-1]].tolist() == [0] * len(own) and (batch.tokens[0, starts[:-1]] == EOS).all()
    assert not batch.weights[0, starts[:-1]].any() and batch.targets.tolist() == batch.weights.flatten().nonzero()[:, 0].tolist()


@pytest.mark.parametrize("options", [{}, {"rope": True, "previous_token": True, "qk_norm": True}], ids=["paper", "options"])
def test_losses_of_packed_samples_are_those_of_padded_rows(samples, options):
    torch.manual_seed(0)
    model = Decoder(decoder_spec(2, 32, 2, 80, init_std=0.2, image_positions=True, **options), VOCABULARY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    own = [samples(0, row) for row in range(7)]
    packed_total, packed_losses = model.losses(pack(own))
    padded = collate(own)
    padded_total, padded_losses = model.losses(padded)
    expected = torch.cat([padded_losses[row, : len(sample.masked.tokens)] for row, sample in enumerate(own)])
    torch.testing.assert_close(packed_losses[0], expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(total, list(model.parameters())) for total in (packed_total, padded_total)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("multiple", [1, 64])
def test_a_filled_up_batch_has_the_same_losses_and_gradients(samples, multiple, monkeypatch):
    """Also where the decoder fills batches up itself, as oneDNN computes its products."""
    torch.manual_seed(0)
    model = Decoder(decoder_spec(2, 32, 2, 80, init_std=0.2, rope=True, previous_token=True), VOCABULARY)
    batch = pack([samples(0, row) for row in range(7)])
    filled = batch.filled_up(multiple)
    length, targets = batch.tokens.shape[1], len(batch.targets)
    assert filled.tokens.shape[1] % multiple == len(filled.targets) % multiple == 0
    assert filled.tokens.shape[1] > length and filled.cu_seqlens.tolist() == [*batch.cu_seqlens.tolist(), filled.tokens.shape[1]]
    assert filled.targets[:targets].equal(batch.targets) and not filled.weights[0, length:].any()

    def computed(own, onednn):
        monkeypatch.setattr(kernels, "prefers_onednn", lambda: onednn and torch.backends.mkldnn.is_available())
        total, losses = model.losses(own)
        assert losses.shape == own.tokens.shape
        return [losses[:, :length], *torch.autograd.grad(total, list(model.parameters()))]

    expected = computed(batch, onednn=False)
    for found in (computed(filled, onednn=False), computed(batch, onednn=True)):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    assert not any(gradient.any() for gradient in computed(batch.without_targets(), onednn=True)[1:])


def test_no_tensor_of_a_packed_batch_grows_with_the_square_of_its_tokens(samples):
    """A mask of all tokens by all tokens would."""
    model = Decoder(decoder_spec(1, 32, 2, 80, qk_norm=True), VOCABULARY)
    batch = pack([samples(0, row) for row in range(32)])
    tokens = batch.tokens.numel()
    with TensorSizes() as seen:
        model.losses(batch)[0].backward()
    assert max(seen.sizes) <= max(tokens * 4 * 32, tokens * VOCABULARY.size) < tokens**2


@pytest.mark.parametrize("kind", [TokenStream, SampleStream])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_any_number_of_processes_computes_the_same_samples(samples, kind, processes):
    def shares(processes):
        streams = [packed(samples, 7) if kind is TokenStream else SampleStream(samples, 40, 7, 0) for _ in range(processes)]
        return [share_of(stream, 0, rank, processes, 2) for rank, stream in enumerate(streams)]

    [whole], own = shares(1), shares(processes)
    assert len({len(share.micro_batches) for share in own}) == 1

    def targets(shares):
        batches = [batch for share in shares for batch in share.micro_batches]
        return sorted(token for batch in batches for token in batch.tokens.flatten()[batch.targets].tolist())

    assert targets(own) == targets([whole])
    batches = [batch for share in own for batch in share.micro_batches]
    for share in own:
        assert (share.weight, share.tokens, share.length) == (whole.weight, whole.tokens, whole.length)
        assert share.weight == sum(float(batch.weights.sum()) for batch in batches)


@pytest.mark.parametrize(("batch_size", "most"), [(12, 3), (12, 1), (13, 4), (8, 8)])
def test_packed_micro_batches_are_as_few_and_as_equal_as_can_be(samples, batch_size, most):
    stream = packed(samples, batch_size)
    for step in range(6):
        own = stream.samples(step)
        total, longest = sum(map(len, tokens_of(own))), max(map(len, tokens_of(own)))
        for processes in (1, 2, 4):
            parts = stream.divide(own, processes, most)
            sizes = [sum(map(len, tokens_of(part))) for mine in parts for part in mine]
            fewest = -(-(total - LENGTH) // (most * LENGTH * processes))
            assert {len(mine) for mine in parts} == {fewest} and fewest <= -(-batch_size // (most * processes))
            assert sum(sizes) == total and max(sizes) <= (most + 1) * LENGTH and max(sizes) - min(sizes) <= longest
    assert [[len(part) for part in mine] for mine in stream.divide(own, 1, None)] == [[len(own)]]


def test_a_stream_resumes_from_its_state(samples):
    stream = packed(samples)
    for step in range(7):
        stream.samples(step)
    again = packed(samples)
    again.load_state(json.loads(json.dumps(stream.state())))
    for step in range(7, 12):
        assert tokens_of(stream.samples(step)) == tokens_of(again.samples(step))


def test_a_sample_longer_than_a_row_is_an_error(samples):
    with pytest.raises(ValueError, match="does not fit in rows of 10"):
        TokenStream(samples, len(samples), 2, 0, 10).samples(0)


def test_micro_batches_of_samples_make_up_the_batch(samples):
    stream = SampleStream(samples, len(samples), 8, 0)
    batch, parts = stream(3), share_of(stream, 3, 0, 1, 3).micro_batches
    assert [len(part.cu_seqlens) - 1 for part in parts] == [3, 3, 2]
    assert torch.equal(torch.cat([part.tokens for part in parts], 1), batch.tokens)


def test_a_step_has_samples_of_all_lengths(samples):
    """Sorted by length, batches of like samples would follow one another."""
    stream = SampleStream(samples, len(samples), 8, 0)
    lengths = np.array([[len(tokens) for tokens in tokens_of(stream.samples(step))] for step in range(20)])
    assert lengths.std(1).mean() > 0.8 * lengths.std()
    assert [tokens_of([stream._samples[position]]) for position in range(8, 16)] == [[tokens] for tokens in tokens_of(stream.samples(1))]


def test_a_worker_makes_the_same_shares_and_ends_with_its_iterator(samples):
    expected = list(Shares(packed(samples), range(4), 1, 2, 3))
    with closing(prefetched(Shares(packed(samples), range(1000), 1, 2, 3))) as draws:
        for share, state in expected:
            found, found_state = next(draws)
            assert found_state == state and found.weight == share.weight
            for one, other in zip(found.micro_batches, share.micro_batches, strict=True):
                assert torch.equal(one.tokens, other.tokens) and torch.equal(one.weights, other.weights)
                assert torch.equal(one.positions, other.positions) and one.cu_seqlens.dtype == torch.int32
                assert not one.tokens.is_shared()
        assert len(multiprocessing.active_children()) == 1
    assert not multiprocessing.active_children()


MANY = """
import resource
from types import SimpleNamespace
import numpy as np
from cm3leon.data.batches import TokenStream
from cm3leon.data.prefetch import Shares, prefetched
from cm3leon.data.sequences import Sample

resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
ones = np.ones(60, np.int64)
sample = Sample(SimpleNamespace(tokens=ones, image_positions=ones), ones.astype(np.float32), ())
stream = TokenStream(lambda epoch, row: sample, 100, 50, 0, 64)
print(*(len(share.micro_batches) for share, _ in prefetched(Shares(stream, range(7), 0, 1, 1))))
"""


def test_a_worker_sends_steps_of_many_micro_batches_with_as_few_open_files_as_a_system_allows():
    done = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True, timeout=60, check=False)
    assert len(done.stdout.split()) == 7 and min(map(int, done.stdout.split())) >= 45, done.stderr
