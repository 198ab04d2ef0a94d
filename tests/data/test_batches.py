"""Packed samples: nothing lost, nothing leaks, the same for any division among processes and after a restart."""

import json
import multiprocessing
from contextlib import closing

import numpy as np
import pytest
import torch
from tests_support import OBJECTIVE, decoder_spec, make_documents
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cm3leon.data.batches import PackedStream, SortedStream, collate, pack
from cm3leon.data.prefetch import prefetched
from cm3leon.data.sequences import PretrainingSamples
from cm3leon.data.tokens import TokenStore, write_tokens
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
    return PackedStream(samples, len(samples), batch_size, 0, LENGTH)


def tokens_of(samples):
    return [sample.masked.tokens.tolist() for sample in samples]


def test_every_sample_is_used_once_whole_and_in_order(samples):
    stream = packed(samples)
    used = {row: [tokens for step in range(10) for tokens in tokens_of(stream.samples(step, [row]))] for row in range(4)}
    for row, found in used.items():
        positions = [row + 4 * number for number in range(len(found))]
        assert found == tokens_of(stream._epochs[position] for position in positions)
        for tokens in found:
            check_grammar(np.array(tokens), VOCABULARY)


def test_steps_use_up_their_budget_of_tokens(samples):
    """What a row trains on is within one sample of its budget after any number of steps."""
    stream, used = packed(samples), 0
    for step in range(10):
        used += sum(map(len, tokens_of(stream.samples(step, [1]))))
        assert (step + 1) * LENGTH - 80 < used <= (step + 1) * LENGTH


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


def test_no_tensor_of_a_packed_batch_grows_with_the_square_of_its_tokens(samples):
    """A mask of all tokens by all tokens would."""
    model = Decoder(decoder_spec(1, 32, 2, 80, qk_norm=True), VOCABULARY)
    batch = pack([samples(0, row) for row in range(32)])
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            sizes.extend(tensor.numel() for tensor in tree_leaves(found) if isinstance(tensor, torch.Tensor))
            return found

    tokens = batch.tokens.numel()
    with Sizes():
        model.losses(batch)[0].backward()
    assert max(sizes) <= max(tokens * 4 * 32, tokens * VOCABULARY.size) < tokens**2


def test_micro_batches_are_as_few_and_as_equal_as_can_be(samples):
    stream = packed(samples, batch_size=12)
    own = stream.samples(0)
    total = sum(map(len, tokens_of(own)))
    parts = stream.divide(own, 3)
    assert len(parts) == -(-total // (3 * LENGTH)) or len(parts) == -(-total // (3 * LENGTH)) + 1
    sizes = [part.tokens.numel() for part in parts]
    assert sum(sizes) == total and max(sizes) <= 3 * LENGTH and max(sizes) - min(sizes) < 80
    assert len(stream.divide(own, 3, 7)) == 7
    assert [part.tokens.numel() for part in stream.divide(own, None)] == [total]


def test_any_division_of_the_rows_gives_the_same_rows(samples):
    whole, first, second = packed(samples), packed(samples), packed(samples)
    for step in range(6):
        expected = [tokens_of(whole.samples(step, [row])) for row in range(4)]
        assert tokens_of(first.samples(step, [0, 2])) == expected[0] + expected[2]
        assert tokens_of(second.samples(step, [1, 3])) == expected[1] + expected[3]
    assert {**first.state(), **second.state()} == whole.state()


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
        PackedStream(samples, len(samples), 2, 0, 10).samples(0)


def test_micro_batches_of_padded_rows_make_up_the_batch(samples):
    stream = SortedStream(samples, len(samples), 8, 0)
    batch, parts = stream(3), stream.divide(stream.samples(3), 3)
    assert [len(part.tokens) for part in parts] == [3, 3, 2]
    for number, part in enumerate(parts):
        length = part.tokens.shape[1]
        assert torch.equal(part.tokens, batch.tokens[3 * number : 3 * number + 3, :length])
        assert (batch.tokens[3 * number : 3 * number + 3, length:] == 0).all()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", [PackedStream, SortedStream])
def test_samples_made_ahead_are_the_same_for_any_number_of_workers(samples, kind, workers):
    def stream():
        return packed(samples, 8) if kind is PackedStream else SortedStream(samples, len(samples), 8, 0)

    resumed = stream()
    [*_, (_, state)] = prefetched(stream(), range(1, 8, 2), range(2), 0)
    resumed.load_state(json.loads(json.dumps(state)))
    expected = [(tokens_of(own), state) for own, state in prefetched(stream(), range(1, 8, 2), range(6), 0)]
    found = [(tokens_of(own), state) for own, state in prefetched(resumed, range(1, 8, 2), range(2, 6), workers)]
    assert found == expected[2:]


def test_workers_end_with_their_iterator(samples):
    with closing(prefetched(packed(samples), range(4), range(1000), 2)) as draws:
        next(draws)
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()
