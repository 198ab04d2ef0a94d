"""Choosing the next token: temperature, top-p, and noise that belongs to a row, not to a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def uniform_noise(seeds: list[int], steps: int) -> Tensor:
    """One uniform number for each row and step, (rows, steps) float64; a row's numbers depend on its own seed alone."""
    rows = [torch.rand(steps, generator=torch.Generator().manual_seed(seed % 2**63), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows) if rows else torch.zeros(0, steps, dtype=torch.float64)


def top_p_probabilities(logits_BV: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities after temperature, cut to the smallest set of tokens whose mass reaches ``top_p`` (Holtzman et al. 2020).

    The most likely token always stays. ``temperature`` 0 puts all mass on it.
    """
    if temperature == 0:
        return F.one_hot(logits_BV.argmax(-1), logits_BV.shape[-1]).to(logits_BV.dtype)
    probabilities = (logits_BV.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(outside, 0))
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def sample(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Invert the cumulative distribution at one uniform number a row; (B,) int64."""
    cumulative = probabilities_BV.double().cumsum(-1)
    threshold = uniform_B.to(cumulative.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=probabilities_BV.shape[-1] - 1)
