"""Each rule of choosing a token against its formula, written out in float64."""

import math

import numpy as np
import pytest
import torch

from cm3leon.config.schema import DecodingConfig
from cm3leon.generation.guidance import classifier_free, editing, scale_at
from cm3leon.generation.sampling import Sampler, at_temperature, contrastive, keep_top_k, keep_top_p, sample, uniform_noise

VALUES = 30
END = torch.ones(1, 1, 1)
"""Progress at an image's last token."""


def logits(*shape, seed=0):
    return torch.randn(*shape, VALUES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def softmax(row):
    powers = [math.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    torch.testing.assert_close(keep_top_p(probabilities, 0.6), torch.tensor([[0.625, 0.375, 0.0, 0.0]]))
    torch.testing.assert_close(keep_top_p(probabilities, 0.01), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(keep_top_p(probabilities, 1.0), probabilities)


def test_top_k_keeps_the_k_most_likely():
    for row in at_temperature(logits(20), 1.0):
        kept = keep_top_k(row[None], 5)[0]
        assert set(kept.nonzero().flatten().tolist()) == set(np.argsort(-row.numpy())[:5].tolist())
        torch.testing.assert_close(kept[kept > 0], row[kept > 0] / row[kept > 0].sum())
    torch.testing.assert_close(keep_top_k(row[None], 1000), row[None])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_divides_the_logits(temperature):
    for row in logits(5):
        expected = softmax([value / temperature for value in row.tolist()])
        assert at_temperature(row, temperature).tolist() == pytest.approx(expected, abs=1e-6)


def test_temperature_zero_is_greedy():
    assert at_temperature(torch.tensor([[1.0, 3.0, 3.0]]), 0.0).tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize(("k", "alpha"), [(1, 0.1), (1, 0.5), (4, 0.5), (VALUES, 0.0), (50, 1.0)])
def test_contrastive_decoding_is_its_formula(k, alpha):
    for expert, amateur in zip(logits(10), logits(10, seed=1), strict=True):
        p, q = softmax(expert.tolist()), softmax(amateur.tolist())
        least = sorted(p, reverse=True)[min(k, VALUES) - 1]
        expected = [math.log(a) - math.log(b) if a >= alpha * least else -math.inf for a, b in zip(p, q, strict=True)]
        assert contrastive(expert, amateur, k, alpha).tolist() == pytest.approx(expected, abs=1e-9)


def test_with_k_1_it_is_the_contrastive_decoding_of_li_et_al():
    """Plausible is what is at least alpha times as likely as the most likely token; the best of it by the difference of logs is chosen."""
    for expert, amateur in zip(logits(50), logits(50, seed=1), strict=True):
        p, q = expert.softmax(-1), amateur.softmax(-1)
        plausible = (p >= 0.1 * p.max()).nonzero().flatten().tolist()
        best = max(plausible, key=lambda token: float(p[token].log() - q[token].log()))
        assert int(contrastive(expert, amateur, 1, 0.1).argmax()) == best


def test_guidance_is_its_formula():
    c, u, i = logits(4), logits(4, seed=1), logits(4, seed=2)
    for scale in (0.0, 1.0, 3.5):
        torch.testing.assert_close(classifier_free(c, u, scale), u + scale * (c - u))
        torch.testing.assert_close(editing(c, i, u, 1.5, scale), u + 1.5 * (i - u) + scale * (c - i))
    torch.testing.assert_close(editing(c, i, u, 1.0, 1.0), c)
    torch.testing.assert_close(editing(c, u, u, 7.0, 3.5), classifier_free(c, u, 3.5))  # an image stream without effect


def test_schedules_rise_from_one_to_the_scale():
    for schedule in ("linear", "cosine"):
        scales = scale_at(schedule, 5.0, torch.arange(11) / 10).tolist()
        assert scales[0] == pytest.approx(1) and scales[-1] == pytest.approx(5) and scales[5] == pytest.approx(3)
        assert scales == sorted(scales)
    assert scale_at("constant", 5.0, torch.arange(11) / 10) == 5.0


def settings(**changes):
    return DecodingConfig(**{"temperature": 0.7, "top_p": 0.9, "guidance": 3.0, **changes})


def test_a_sampler_is_guidance_temperature_top_k_and_top_p_in_this_order():
    streams = torch.stack([logits(2, 3, 5), logits(2, 3, 5, seed=1)])
    expected = keep_top_p(keep_top_k(at_temperature(classifier_free(*streams, 3.0), 0.7), 8), 0.9)  # type: ignore[call-arg]
    torch.testing.assert_close(Sampler(settings(top_k=8)).probabilities(streams, END), expected)


def test_half_and_half_samples_the_last_candidates_by_contrastive_decoding():
    streams = torch.stack([logits(2, 4, 5), logits(2, 4, 5, seed=1)])
    found = Sampler(settings(contrastive=0.5, contrastive_k=3)).probabilities(streams, END)
    torch.testing.assert_close(found[:, :2], Sampler(settings()).probabilities(streams, END)[:, :2])
    torch.testing.assert_close(found[:, 2:], at_temperature(contrastive(*streams[:, :, 2:], 3, 0.5), 0.7))  # type: ignore[call-arg]
    all_of_them = Sampler(settings(contrastive=1.0)).probabilities(streams, END)
    assert all_of_them.shape == found.shape
    torch.testing.assert_close(all_of_them.sum(-1), torch.ones(2, 4, 5, dtype=all_of_them.dtype))


def test_which_candidates_are_sampled_by_contrastive_decoding_does_not_depend_on_the_batch():
    streams = torch.stack([logits(1, 5, 5), logits(1, 5, 5, seed=1)])
    sampler = Sampler(settings(contrastive=0.5))
    together = sampler.of_batch(range(5), 5).probabilities(streams, END)
    for size in (1, 2, 3):
        batches = [range(start, min(start + size, 5)) for start in range(0, 5, size)]
        found = [sampler.of_batch(numbers, 5).probabilities(streams[:, :, list(numbers)], END) for numbers in batches]
        torch.testing.assert_close(torch.cat(found, 1), together)


def test_three_streams_are_for_editing():
    streams = torch.stack([logits(1, 2, 5, seed=seed) for seed in range(3)])
    expected = at_temperature(editing(*streams, 1.2, 3.0), 0.7)  # type: ignore[call-arg]
    torch.testing.assert_close(Sampler(settings(image_guidance=1.2, top_p=1.0)).probabilities(streams, END / 2), expected)


def test_streams_that_are_needed():
    plain, edits = Sampler(settings(guidance=1.0)), Sampler(settings(guidance=1.0, image_guidance=1.0))
    assert plain.streams_needed(2) == edits.streams_needed(2) == edits.streams_needed(3) == 1 and plain.streams_needed(3) == 3
    assert Sampler(settings()).streams_needed(2) == Sampler(settings(guidance=1.0, contrastive=0.5)).streams_needed(2) == 2


def test_samples_follow_the_probabilities():
    probabilities = torch.tensor([[0.1, 0.0, 0.6, 0.3]]).expand(20_000, 4)
    sampled = sample(probabilities, torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    shares = torch.bincount(sampled, minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.0, 0.6, 0.3]), atol=0.015, rtol=0)
    assert shares[1] == 0


def test_noise_belongs_to_the_seed():
    assert torch.equal(uniform_noise([3, 4], 5)[1], uniform_noise([4], 9)[0, :5])
