"""Decoding against a reference that recomputes everything for every token."""

import numpy as np
import pytest
import torch

from cm3leon.documents import BREAK, EOS, EOSS, Vocabulary
from cm3leon.generation.engine import PromptTooLongError, generate_images, generate_texts, text_log_likelihoods
from cm3leon.generation.sampling import sample, top_p_probabilities, uniform_noise
from cm3leon.model import Decoder, DecoderSpec

VOCABULARY = Vocabulary(text_size=40, image_size=20, sentinels=4, tokens_per_image=9)
OPTIONS = {"temperature": 1.0, "top_p": 0.9}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Decoder(DecoderSpec(layers=2, width=32, heads=4, context=64, init_std=0.5, image_positions=True), VOCABULARY)
    for block in model.blocks:
        torch.nn.init.normal_(block.attention.out.weight, std=0.3)
        torch.nn.init.normal_(block.down.weight, std=0.3)
    return model.eval()


def prompt(length, seed=0):
    text = VOCABULARY.text(np.random.default_rng(seed).integers(40, size=length))
    return np.concatenate([[EOS], text, [BREAK]])


UNCONDITIONAL = np.array([EOS, VOCABULARY.sentinel(0), BREAK])


@torch.no_grad()
def forward(model, tokens):
    """Logits after the last token, all recomputed."""
    hidden = model(torch.from_numpy(tokens)[None], torch.from_numpy(VOCABULARY.places(tokens))[None])
    return model.logits(hidden)[0, -1]


@torch.no_grad()
def reference_image(model, conditional, unconditional, seed, scale, temperature, top_p):
    noise = uniform_noise([seed], VOCABULARY.tokens_per_image)
    codes = []
    for step in range(VOCABULARY.tokens_per_image):
        drawn = np.array([c + VOCABULARY.image_start for c in codes], dtype=np.int64)
        rows = [forward(model, np.concatenate([p, drawn])) for p in (conditional, unconditional)]
        c, u = (row[None, VOCABULARY.image_start : VOCABULARY.text_start] for row in rows)
        logits = u + scale * (c - u)
        codes.append(int(sample(top_p_probabilities(logits, temperature, top_p), noise[:, step])))
    return codes


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_images_equal_the_reference_whatever_the_batch(model, scale):
    prompts = [prompt(3, 1), prompt(11, 2), prompt(1, 3)]
    seeds = [5, 6, 7]
    codes = generate_images(model, prompts, [UNCONDITIONAL] * 3, seeds, guidance=scale, **OPTIONS)
    assert codes.shape == (3, 9) and codes.min() >= 0 and codes.max() < 20
    for row in range(3):
        assert codes[row].tolist() == reference_image(model, prompts[row], UNCONDITIONAL, seeds[row], scale, 1.0, 0.9)


def test_guidance_with_another_stream_changes_the_image(model):
    greedy = {"temperature": 0.0, "top_p": 1.0}
    plain = generate_images(model, [prompt(5)], [UNCONDITIONAL], [0], guidance=1.0, **greedy)
    guided = generate_images(model, [prompt(5)], [UNCONDITIONAL], [0], guidance=8.0, **greedy)
    same = generate_images(model, [prompt(5)], [prompt(5)], [0], guidance=8.0, **greedy)
    assert not np.array_equal(plain, guided)
    assert np.array_equal(plain, same)


def test_texts_equal_the_reference(model):
    prompts = [np.append(prompt(4, 1), VOCABULARY.sentinel(0)), np.append(prompt(9, 2), VOCABULARY.sentinel(0))]
    texts = generate_texts(model, prompts, [0, 0], temperature=0.0, top_p=1.0, max_tokens=12)
    for row, start in enumerate(prompts):
        tokens, expected = start, []
        while len(expected) < 12:
            logits = forward(model, tokens)
            allowed = torch.cat([logits[EOSS : EOSS + 1], logits[VOCABULARY.text_start :]])
            best = int(allowed.argmax())
            if best == 0:
                break
            expected.append(best - 1)
            tokens = np.append(tokens, best - 1 + VOCABULARY.text_start)
        assert texts[row] == expected


def test_likelihoods_equal_the_reference(model):
    prompts = [np.append(prompt(4, seed), VOCABULARY.sentinel(0)) for seed in (1, 2, 3)]
    text = VOCABULARY.text([7, 0, 39])
    found = text_log_likelihoods(model, prompts, text)
    for row, start in enumerate(prompts):
        expected, tokens = 0.0, start
        for token in [*text.tolist(), EOSS]:
            expected += forward(model, tokens).log_softmax(-1)[token].item()
            tokens = np.append(tokens, token)
        assert found[row].item() == pytest.approx(expected, abs=1e-4)
    with pytest.raises(PromptTooLongError, match="context of 64"):
        text_log_likelihoods(model, prompts, VOCABULARY.text([1] * 60))


def test_what_does_not_fit_is_an_error(model):
    with pytest.raises(PromptTooLongError, match="context of 64"):
        generate_images(model, [prompt(60)], [UNCONDITIONAL], [0], guidance=1.0, **OPTIONS)


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    torch.testing.assert_close(top_p_probabilities(logits, 1.0, 0.6), torch.tensor([[0.625, 0.375, 0.0, 0.0]]))
    torch.testing.assert_close(top_p_probabilities(logits, 1.0, 0.01), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(top_p_probabilities(logits, 1.0, 1.0), logits.exp())
    assert top_p_probabilities(logits, 0.0, 1.0).tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_samples_follow_the_probabilities():
    probabilities = torch.tensor([[0.1, 0.0, 0.6, 0.3]]).expand(20_000, 4)
    drawn = sample(probabilities, torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    shares = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.0, 0.6, 0.3]), atol=0.015, rtol=0)
    assert shares[1] == 0


def test_noise_belongs_to_the_seed():
    assert torch.equal(uniform_noise([3, 4], 5)[1], uniform_noise([4], 9)[0, :5])
