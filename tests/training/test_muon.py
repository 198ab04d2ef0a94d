"""Muon: singular values near 1, and the updates of torch's implementation."""

import pytest
import torch

from cm3leon.training.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 64), (4, 64, 16)])
def test_singular_values_become_near_one_and_singular_vectors_stay(shape):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(0.05, 1, left.shape[-1])
    found = orthogonalize(left * values @ right)
    kept = torch.diagonal(left.mT @ found @ right.mT, dim1=-2, dim2=-1)
    assert torch.all((kept > 0.5) & (kept < 1.5)), kept
    assert torch.linalg.norm(found - left * kept[..., None, :] @ right) < 1e-3


def test_updates_are_those_of_torchs_muon():
    torch.manual_seed(0)
    start = [torch.randn(48, 16), torch.randn(16, 48), torch.randn(48, 16), torch.randn(24, 24)]
    ours, theirs = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(2))
    optimizer = Muon(ours, lr=0.05, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(a.shape, generator=torch.Generator().manual_seed(10 * step + number))
            a.grad, b.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    for a, b, first in zip(ours, theirs, start, strict=True):
        moved = (b - first).norm()
        assert (a - b).norm() < 0.02 * moved  # the reference computes in bfloat16
        assert moved > 0.5


def test_a_convolution_is_updated_as_the_matrix_of_its_filters():
    start = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    filters, matrix = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.flatten(1).clone())
    filters.grad = torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    matrix.grad = filters.grad.flatten(1)
    Muon([filters, matrix], lr=0.1, weight_decay=0.1).step()
    assert torch.allclose(filters.flatten(1), matrix, atol=1e-6)


def test_parameters_without_a_gradient_do_not_change_and_vectors_are_refused():
    still = torch.nn.Parameter(torch.ones(4, 4))
    Muon([still], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(still, torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"takes matrices.*\(4,\)"):
        Muon([torch.nn.Parameter(torch.ones(4))], lr=1.0, weight_decay=0.0)
