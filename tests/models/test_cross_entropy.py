"""The chunked cross-entropy has the losses and gradients of the plain one, with z-loss, for any chunk."""

import pytest
import torch
import torch.nn.functional as F

from cm3leon.models import kernels
from cm3leon.models.cross_entropy import chunked_cross_entropy


def inputs(tokens=37, width=16, vocabulary=101):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
    output = torch.randn(vocabulary, width, generator=generator, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden, output, targets, torch.rand(tokens, generator=generator)


def plain(hidden, output, targets, weights, z_loss):
    logits = hidden @ output.T
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (weights * (losses + z_loss * logits.logsumexp(1).square())).sum(), losses


@pytest.mark.parametrize(("tokens", "chunk"), [(37, 1), (37, 5), (37, 37), (37, 1000), (320, 128)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("slow_mkl", [False, True])
def test_total_losses_and_gradients_are_those_of_the_plain_computation(tokens, chunk, z_loss, slow_mkl, monkeypatch):
    monkeypatch.setattr(kernels, "prefers_onednn", lambda: slow_mkl and torch.backends.mkldnn.is_available())
    hidden, output, targets, weights = inputs(tokens)
    total, losses = chunked_cross_entropy(hidden, output, targets, weights, z_loss, chunk)
    (3 * total).backward()
    grads = hidden.grad, output.grad
    hidden.grad = output.grad = None
    expected, expected_losses = plain(hidden, output, targets, weights, z_loss)
    (3 * expected).backward()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(grads, (hidden.grad, output.grad), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_large_logits_do_not_overflow():
    hidden, output, targets, weights = inputs()
    total, losses = chunked_cross_entropy(hidden * 1000, output, targets, weights)
    assert torch.isfinite(total)
    assert torch.isfinite(losses).all()


def test_without_gradients_the_total_needs_none():
    hidden, output, targets, weights = inputs()
    with torch.no_grad():
        total, _ = chunked_cross_entropy(hidden, output, targets, weights)
    assert not total.requires_grad


def test_bfloat16_autocast_is_near_float32():
    hidden, output, targets, weights = inputs()
    expected, _ = plain(hidden, output, targets, weights, 0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = chunked_cross_entropy(hidden, output, targets, weights)
    total.backward()
    assert total.dtype == hidden.grad.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), rel=0.02)
