"""The decoder: parameter layout, causality, and cached decoding equal to the full pass."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import decoder_spec

from cm3leon.models.decoder import MAX_ATTENTION_LOGIT, WEIGHTS, Attention, Decoder, Int8Linear, PackedLinear, RotaryEmbedding
from cm3leon.models.kernels import apply_rotary_emb
from cm3leon.sequence.grammar import Vocabulary

VOCABULARY = Vocabulary(text_size=40, image_size=20, sentinels=4, tokens_per_image=9)


def make(seed=0, **options):
    torch.manual_seed(seed)
    model = Decoder(decoder_spec(layers=2, width=32, heads=4, context=48, init_std=0.1, **options), VOCABULARY)
    for block in model.blocks:  # zero output layers would hide everything attention does
        torch.nn.init.normal_(block.attention.out.weight, std=0.2)
        torch.nn.init.normal_(block.down.weight, std=0.2)
    return model.eval()


def draw(*shape):
    """Random tokens and their image_positions."""
    tokens = torch.randint(VOCABULARY.size, shape)
    return tokens, torch.from_numpy(np.stack([VOCABULARY.image_positions(row) for row in tokens.numpy()]))


def test_parameters_are_matrices_only_and_outputs_start_at_zero():
    model = Decoder(decoder_spec(2, 32, 4, 48), VOCABULARY)
    assert all(p.ndim == 2 for p in model.parameters())
    expected = VOCABULARY.size * 32 + 48 * 32 + 2 * 12 * 32 * 32
    assert model.parameter_count == expected
    assert all(not block.attention.out.weight.any() and not block.down.weight.any() for block in model.blocks)
    assert model.tokens.weight.abs().max() <= 3 * 0.006 + 1e-6
    assert model.positions.weight.abs().max() <= 3 * 0.0002 + 1e-7


def test_a_token_sees_nothing_after_it():
    model = make()
    tokens, image_positions = draw(1, 20)
    changed = tokens.clone()
    changed[0, 12:] = torch.randint(VOCABULARY.size, (8,))
    assert torch.equal(model(tokens, image_positions)[:, :12], model(changed, image_positions)[:, :12])
    assert not torch.allclose(model(tokens, image_positions)[:, 12:], model(changed, image_positions)[:, 12:])


def test_places_matter_to_image_tokens_only_where_the_option_is_on():
    tokens, image_positions = draw(1, 20)
    assert torch.equal(make()(tokens, image_positions), make()(tokens, image_positions.flip(1)))
    model = make(image_positions=True)
    assert not torch.allclose(model(tokens, image_positions), model(tokens, image_positions.flip(1)))
    assert not model.image_positions.weight[0].any()


def test_rope_depends_on_the_step_from_a_key_to_the_place_that_comes_next():
    """The product of a turned query and a turned key is that of the same two further along, in an image or a sequence."""
    rope = RotaryEmbedding(16, 16, 48)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def product(query, key):
        """Of a query and a key at (place, position)."""
        of_query, of_key = (rope(*(torch.tensor([[value]]) for value in where))[0, 0] for where in (query, key))
        return (apply_rotary_emb(q, of_query[0]) * apply_rotary_emb(k, of_key[1])).sum().item()

    unturned = (q * k).sum().item()
    for place in range(1, 17):  # the token before it is at place - 1, or no image token
        assert product((place - 1, 7), (place, 7)) == pytest.approx(unturned, abs=1e-5)
    assert product((16, 0), (0, 0)) == pytest.approx(unturned, abs=1e-5)
    assert product((5, 0), (2, 0)) == pytest.approx(product((9, 0), (6, 0)), abs=1e-5)  # a row further down
    assert product((5, 0), (2, 0)) == pytest.approx(product((6, 0), (3, 0)), abs=1e-5)  # a column further right
    assert product((0, 9), (0, 4)) == pytest.approx(product((0, 29), (0, 24)), abs=1e-5)
    assert len({round(product((0, 0), (place, 0)), 4) for place in range(1, 17)}) == 16
    assert len({round(product((0, 47), (0, position)), 4) for position in range(48)}) == 48


def test_rope_needs_square_images():
    with pytest.raises(ValueError, match="square images"):
        RotaryEmbedding(16, 12, 48)


def test_rope_is_made_on_the_meta_device_also_where_linspace_is_not(monkeypatch):
    real = torch.linspace  # so transformers replaces it while it loads a model
    monkeypatch.setattr(torch, "linspace", lambda *args, **kwargs: real(*args, **{"device": "cpu"} | kwargs))
    with torch.device("meta"):
        rope = RotaryEmbedding(16, 16, 48)
    assert {buffer.device.type for buffer in rope.buffers()} == {"meta"}


def test_a_token_knows_the_one_before_in_its_own_sample():
    """Of a decoder whose attention does nothing."""
    model = make(previous_token=True)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attention.out.weight)
    tokens, image_positions = draw(1, 20)
    changed = tokens.clone()
    changed[0, 7] = (tokens[0, 7] + 1) % VOCABULARY.size
    differs = (model(tokens, image_positions) != model(changed, image_positions)).any(-1)[0]
    assert differs.nonzero()[:, 0].tolist() == [7, 8]
    positions = torch.tensor([[*range(8), *range(12)]])  # a second sample begins behind it
    differs = (model(tokens, image_positions, positions_BT=positions) != model(changed, image_positions, positions_BT=positions)).any(-1)[0]
    assert differs.nonzero()[:, 0].tolist() == [7]


def test_image_tokens_that_look_alike_start_alike():
    model = make()
    entries = torch.randn(VOCABULARY.image_size, 6)
    entries[1] = entries[0] + 1e-4
    before = model.tokens.weight.detach().clone()
    model.start_from_codebook(entries, 0.05)
    image = model.tokens.weight.detach()[VOCABULARY.image_start : VOCABULARY.text_start]
    assert image.std() == pytest.approx(0.05, rel=1e-3)
    distances = torch.cdist(image, image)
    assert distances[0, 1] < 0.01 * distances[0, 2:].min()
    assert torch.equal(model.tokens.weight[VOCABULARY.text_start :], before[VOCABULARY.text_start :])


def test_logits_of_a_slice_are_the_slice_of_the_logits():
    model = make()
    hidden = model(*draw(2, 5))
    start, stop = VOCABULARY.image_start, VOCABULARY.text_start
    torch.testing.assert_close(model.logits(hidden, start, stop), model.logits(hidden)[..., start:stop])


@pytest.mark.parametrize("heads", [2, 8])
def test_normalized_attention_is_as_sharp_in_heads_of_any_size_and_length(heads):
    """A query weighs a key of its own direction and one whose cosine with it is 0.8 as logits 0.2 of the largest apart."""
    attention = Attention(decoder_spec(layers=1, width=32, heads=heads, context=8, qk_norm=True), 0)
    direction, across = torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat(8), torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(8)
    tokens = torch.stack([0.8 * direction + 0.6 * across, direction])
    with torch.no_grad():
        attention.out.weight.copy_(torch.eye(32))
        for scale in (0.1, 10.0):
            attention.qkv.weight.copy_(torch.cat([torch.eye(32) * scale, torch.eye(32) * scale, torch.eye(32)]))
            [_, found] = attention(tokens[None], None, None, None)[0]
            other = torch.sigmoid(torch.tensor(-0.2 * MAX_ATTENTION_LOGIT))
            torch.testing.assert_close(found, other * tokens[0] + (1 - other) * tokens[1], rtol=2e-3, atol=1e-4)


def test_too_long_is_an_error():
    with pytest.raises(ValueError, match="context of 48"):
        make()(*draw(1, 49))


def test_save_and_load_give_the_same_model(tmp_path):
    model = make()
    model.save(tmp_path)
    again = Decoder.load(tmp_path)
    assert again.vocabulary == VOCABULARY and again.spec == model.spec
    assert all(np.array_equal(a.detach(), b.detach()) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_files_of_earlier_versions_load(tmp_path):
    """``rope`` was called ``rotation``, and the embedding of image positions ``places``."""
    model = make(image_positions=True, rope=True)
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["decoder"]["rotation"] = config["decoder"].pop("rope")
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["places.weight"] = tensors.pop("image_positions.weight")
    save_file(tensors, tmp_path / WEIGHTS)
    again = Decoder.load(tmp_path)
    assert again.spec == model.spec
    inputs = draw(2, 12)
    assert torch.equal(again(*inputs), model(*inputs))


def test_load_says_where_nothing_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="no decoder here"):
        Decoder.load(tmp_path)


def test_eight_bit_matrices_are_a_quarter_as_large_and_almost_the_same():
    model, tokens = make(), draw(3, 20)
    expected = model(*tokens)
    before = sum(p.nbytes for p in model.blocks.parameters())
    model.quantize()
    assert not list(model.blocks.parameters())
    assert sum(b.nbytes for b in model.blocks.buffers()) < before / 4 * 1.2  # with the scales, which are much beside a width of 32
    found = model(*tokens)
    assert (found - expected).norm() / expected.norm() < 0.02


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_packed_matrices_give_the_same_and_can_be_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("cm3leon.models.kernels.MIN_PACKED_WEIGHT", 32 * 64)
    monkeypatch.setattr("cm3leon.models.kernels.prefers_onednn", lambda: True)
    model, tokens = make(), draw(3, 20)
    weight = model.blocks[1].up.weight.detach().clone()
    with torch.inference_mode():
        expected = model(*tokens)
        model.pack()
        assert [isinstance(layer, PackedLinear) for layer in (model.blocks[0].up, model.blocks[0].attention.out)] == [True, False]
        torch.testing.assert_close(model(*tokens), expected, rtol=1e-5, atol=1e-5)
    model.save(tmp_path)
    assert torch.equal(Decoder.load(tmp_path).blocks[1].up.weight, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_eight_bit_weight_is_within_half_a_step_of_its_own(dtype):
    """A step is the scale as it is stored, also where bfloat16 has rounded it."""
    matrix = make().blocks[0].up.to(dtype)
    held, weight = Int8Linear(matrix), matrix.weight.float()
    step = held.scale.float()[:, None]
    assert held.scale.dtype == dtype and ((held.weight * step - weight).abs() <= step / 2 + 1e-7).all()
    torch.testing.assert_close(step, weight.abs().amax(1, keepdim=True) / 127, rtol=0.004, atol=0)
