"""The decoder: parameter layout, causality, and cached decoding equal to the full pass."""

import numpy as np
import pytest
import torch

from cm3leon.documents import Vocabulary
from cm3leon.model import Decoder, DecoderSpec, KeyValueCache

VOCABULARY = Vocabulary(text_size=40, image_size=20, sentinels=4, tokens_per_image=9)


def make(qk_norm=False, seed=0):
    torch.manual_seed(seed)
    model = Decoder(DecoderSpec(layers=2, width=32, heads=4, context=48, init_std=0.1, qk_norm=qk_norm), VOCABULARY)
    for block in model.blocks:  # zero output layers would hide everything attention does
        torch.nn.init.normal_(block.attention.out.weight, std=0.2)
        torch.nn.init.normal_(block.down.weight, std=0.2)
    return model.eval()


def test_parameters_are_matrices_only_and_outputs_start_at_zero():
    model = Decoder(DecoderSpec(2, 32, 4, 48), VOCABULARY)
    assert all(p.ndim == 2 for p in model.parameters())
    expected = VOCABULARY.size * 32 + 48 * 32 + 2 * 12 * 32 * 32
    assert model.parameter_count == expected
    assert all(not block.attention.out.weight.any() and not block.down.weight.any() for block in model.blocks)
    assert model.tokens.weight.abs().max() <= 3 * 0.006 + 1e-6
    assert model.positions.weight.abs().max() <= 3 * 0.0002 + 1e-7


def test_a_token_sees_nothing_after_it():
    model = make()
    tokens = torch.randint(VOCABULARY.size, (1, 20))
    changed = tokens.clone()
    changed[0, 12:] = torch.randint(VOCABULARY.size, (8,))
    assert torch.equal(model(tokens)[:, :12], model(changed)[:, :12])
    assert not torch.allclose(model(tokens)[:, 12:], model(changed)[:, 12:])


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cached_decoding_equals_the_full_pass(qk_norm):
    model = make(qk_norm)
    tokens = torch.randint(VOCABULARY.size, (3, 20))
    cache = KeyValueCache(model.spec, 3, 20, torch.device("cpu"), torch.float32)
    parts = [model(tokens[:, :7], cache)] + [model(tokens[:, i : i + 1], cache) for i in range(7, 20)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-5, rtol=1e-5)


def test_logits_of_a_slice_are_the_slice_of_the_logits():
    model = make()
    hidden = model(torch.randint(VOCABULARY.size, (2, 5)))
    start, stop = VOCABULARY.image_start, VOCABULARY.text_start
    torch.testing.assert_close(model.logits(hidden, start, stop), model.logits(hidden)[..., start:stop])


def test_too_long_is_an_error():
    with pytest.raises(ValueError, match="context of 48"):
        make()(torch.zeros(1, 49, dtype=torch.int64))


def test_save_and_load_give_the_same_model(tmp_path):
    model = make()
    model.save(tmp_path)
    again = Decoder.load(tmp_path)
    assert again.vocabulary == VOCABULARY and again.spec == model.spec
    assert all(np.array_equal(a.detach(), b.detach()) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_load_says_where_nothing_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="no decoder here"):
        Decoder.load(tmp_path)
