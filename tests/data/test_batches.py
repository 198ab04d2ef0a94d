"""Packed rows: nothing lost, nothing leaks, the same for any division among processes and after a restart."""

import json

import numpy as np
import pytest
import torch
from tests_support import OBJECTIVE, decoder_spec, make_documents

from cm3leon.data.batches import LOOKAHEAD, PackedStream, SortedStream, collate, pack
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


def rows_of(batch):
    """The samples of each row, as token lists."""
    return [
        [batch.tokens[row][batch.samples[row] == number].tolist() for number in range(1, int(batch.samples[row].max()) + 1)]
        for row in range(len(batch.tokens))
    ]


def test_every_sample_appears_once_whole_and_in_the_grammar(samples):
    drawn = []

    def draw(epoch, row):
        drawn.append(samples(epoch, row))
        return drawn[-1]

    stream = PackedStream(draw, len(samples), 4, 0, LENGTH)
    found = [sample for step in range(10) for row in rows_of(stream(step)) for sample in row]
    for sample in found:
        check_grammar(np.array(sample), VOCABULARY)
    held = 4 * (LOOKAHEAD - 1)
    every = sorted(masked.tokens.tolist() for masked, *_ in drawn)
    assert len(every) - 4 * LOOKAHEAD <= len(found) <= len(every) - held + 4
    for sample in found:
        every.remove(sample)  # each is one that was drawn, and none comes twice


def test_rows_are_well_filled(samples):
    stream = packed(samples)
    filled = np.mean([(stream(step).samples > 0).float().mean().item() for step in range(10)])
    assert filled > 0.85


def test_the_opening_token_of_a_sample_is_no_target_and_positions_restart(samples):
    batch = packed(samples)(0)
    starts = batch.positions.eq(0) & (batch.samples > 0)
    assert (batch.tokens[starts] == EOS).all()
    assert (batch.weights[starts] == 0).all()
    assert (batch.weights[batch.samples == 0] == 0).all()


def test_losses_of_packed_samples_are_those_of_the_samples_alone(samples):
    torch.manual_seed(0)
    model = Decoder(decoder_spec(2, 32, 2, LENGTH, init_std=0.2, image_positions=True), VOCABULARY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    four = [samples(0, row) for row in range(4)]
    one = pack([four[:2], four[2:]], LENGTH)
    _, together = model.losses(one.tokens, one.weights, one.image_positions, one.samples, one.positions)
    apart = collate(four)
    _, alone = model.losses(apart.tokens, apart.weights, apart.image_positions)
    for number in range(4):
        row, place = divmod(number, 2)
        expected = alone[number][: len(four[number][0].tokens)]
        torch.testing.assert_close(together[row][one.samples[row] == place + 1], expected, rtol=1e-4, atol=1e-5)


def test_any_division_of_the_rows_gives_the_same_rows(samples):
    whole, first, second = packed(samples), packed(samples), packed(samples)
    for step in range(6):
        expected = rows_of(whole(step))
        assert rows_of(first(step, [0, 2])) == [expected[0], expected[2]]
        assert rows_of(second(step, [1, 3])) == [expected[1], expected[3]]
    assert {**first.state(), **second.state()} == whole.state()


def test_a_stream_resumes_from_its_state(samples):
    stream = packed(samples)
    for step in range(7):
        stream(step)
    again = packed(samples)
    again.load_state(json.loads(json.dumps(stream.state())))
    for step in range(7, 12):
        assert torch.equal(stream(step).tokens, again(step).tokens)


def test_a_sample_longer_than_a_row_is_an_error(samples):
    with pytest.raises(ValueError, match="does not fit in rows of 10"):
        PackedStream(samples, len(samples), 2, 0, 10)(0)


def test_micro_batches_make_up_the_batch(samples):
    batch = SortedStream(samples, len(samples), 8, 0)(3)
    parts = [batch.rows(slice(start, start + 3)) for start in range(0, 8, 3)]
    assert [len(part.tokens) for part in parts] == [3, 3, 2]
    for number, part in enumerate(parts):
        length = part.tokens.shape[1]
        assert torch.equal(part.tokens, batch.tokens[3 * number : 3 * number + 3, :length])
        assert (batch.tokens[3 * number : 3 * number + 3, length:] == 0).all()
