"""Next-token cross-entropy over a large vocabulary, without ever holding the logits of the whole batch.

Logits are made, turned into their own gradient and dropped again a chunk of tokens at a time, so that beside the gradients of hidden
states and output matrix only one chunk is in memory. Nothing is computed twice: the gradients are made in the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Logits made at once: 4 MB of float32 where caches are small, 512 MB where matrices should be large. They are held two or three times."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, output_VD: Tensor, targets_N: Tensor, weights_N: Tensor, z_loss: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        output = output_VD.to(dtype)
        want_gradient = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden_ND) if want_gradient else None
        grad_output = torch.zeros_like(output_VD, dtype=torch.float32) if want_gradient else None
        losses = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        held, likely = (losses.new_empty(min(chunk, len(hidden_ND)), len(output_VD)) for _ in range(2))
        rounded = held if dtype == torch.float32 else torch.empty_like(held, dtype=dtype)
        total = losses.new_zeros(())
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden_ND), chunk):
                part = slice(start, start + chunk)
                hidden, targets, weights = hidden_ND[part].to(dtype), targets_N[part], weights_N[part]
                logits, probabilities, products = (buffer[: len(hidden)] for buffer in (held, likely, rounded))
                torch.mm(hidden, output.T, out=products)
                if rounded is not held:
                    logits.copy_(products)
                target_logits = logits.gather(1, targets[:, None])[:, 0]
                highest = logits.amax(1)
                torch.softmax(logits, 1, out=probabilities)
                log_sums = highest - probabilities.amax(1).log()  # the likeliest has one over the sum of the exponentials
                losses[part] = log_sums - target_logits
                total += (weights * (losses[part] + z_loss * log_sums.square())).sum()
                if grad_hidden is not None and grad_output is not None:
                    factors = 1 + 2 * z_loss * log_sums
                    probabilities[torch.arange(len(targets), device=targets.device), targets] -= 1 / factors
                    scale = (weights * factors)[:, None]  # of rows: of the hidden states, which are fewer numbers than the logits
                    gradient = probabilities if rounded is held else products.copy_(probabilities)
                    grad_hidden[part] = (gradient @ output) * scale
                    scaled = (hidden * scale).to(dtype)
                    grad_output.addmm_(gradient.T, scaled) if dtype == torch.float32 else grad_output.add_(gradient.T @ scaled)
        if grad_hidden is not None and grad_output is not None:
            ctx.save_for_backward(grad_hidden, grad_output.to(output_VD.dtype))
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_output = ctx.saved_tensors
        return grad_hidden * gradients[0], grad_output * gradients[0], None, None, None, None


def chunked_cross_entropy(
    hidden_ND: Tensor, output_VD: Tensor, targets_N: Tensor, weights_N: Tensor, z_loss: float = 0.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies of ``targets``, and each one's, nats.

    Args:
        hidden_ND: hidden states; their logits are ``hidden @ output.T``, computed in autocast's dtype where that is on.
        output_VD: the output matrix.
        targets_N: ids.
        weights_N: weight of each in the sum.
        z_loss: adds ``z_loss * log(Z)**2`` to each loss of the sum, which keeps logits from drifting (Chameleon, arXiv 2405.09818).
        chunk: tokens at once; by default as many as :data:`CHUNK_ELEMENTS` logits are.

    Returns:
        The sum, float32 and differentiable, and the cross-entropies alone (N,), float32 and not.
    """
    rows = chunk or max(1, CHUNK_ELEMENTS.get(hidden_ND.device.type, 1 << 26) // len(output_VD))
    total, losses = _ChunkedCrossEntropy.apply(hidden_ND, output_VD, targets_N, weights_N, z_loss, rows)
    return total, losses
