"""Next-token cross-entropy over a large vocabulary, without ever holding the logits of the whole batch.

For one token with hidden state h, output matrix W, target y, weight w and z-loss coefficient c:

    l = W h,    log Z = log sum_v exp(l_v)
    loss        = w (log Z - l_y + c (log Z)^2)
    d loss/d l  = w ((1 + 2 c log Z) softmax(l) - onehot(y))
    d loss/d h  = W^T (d loss/d l),    d loss/d W = (d loss/d l) h^T

The last term of the loss is the z-loss, which keeps logits from drifting (Chameleon, arXiv 2405.09818, section 2.3).

Logits are computed and turned into their own gradient one chunk of tokens at a time, already in the forward pass: nothing is computed
twice, and only one chunk is in memory together with the gradients of hidden states and output matrix.

Shapes: N tokens, C tokens of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cm3leon.models.kernels import ROWS_MULTIPLE, add_linear_weight_gradient, linear, linear_input_gradient

CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Logits of a chunk: 4 MB of float32 on CPUs, with their small caches, 512 MB on GPUs, which want large matrices. Two or three buffers of
this size are held."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, output_VD: Tensor, targets_N: Tensor, weights_N: Tensor, z_loss: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        # 1. Buffers. Products are in autocast's dtype; logits, softmax and losses are float32.
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        matrix_VD = output_VD.to(dtype)
        needs_gradient = any(ctx.needs_input_grad[:2])
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_gradient else None
        grad_output_VD = torch.zeros_like(output_VD, dtype=torch.float32) if needs_gradient else None
        losses_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        total = losses_N.new_zeros(())
        softmax_buffer = losses_N.new_empty(min(chunk, len(hidden_ND)), len(output_VD))
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden_ND), chunk):
                rows = slice(start, start + chunk)
                hidden_CD, targets_C, weights_C = hidden_ND[rows].to(dtype), targets_N[rows], weights_N[rows]
                softmax_CV = softmax_buffer[: len(hidden_CD)]
                # 2. Logits, log Z and losses. The largest probability is exp(max l) / Z, so log Z needs no second pass over the logits.
                logits_CV = linear(hidden_CD, matrix_VD).float()
                target_logits_C = logits_CV.gather(1, targets_C[:, None])[:, 0]
                max_logits_C = logits_CV.amax(1)
                torch.softmax(logits_CV, 1, out=softmax_CV)
                del logits_CV
                log_z_C = max_logits_C - softmax_CV.amax(1).log()
                losses_N[rows] = log_z_C - target_logits_C
                total += (weights_C * (losses_N[rows] + z_loss * log_z_C.square())).sum()
                # 3. Gradients. d loss/d l is scale * (softmax - onehot / factor), with factor = 1 + 2 c log Z and scale = w * factor; the
                #    scale is applied to rows of width D rather than V, which is cheaper.
                if grad_hidden_ND is not None and grad_output_VD is not None:
                    factors_C = 1 + 2 * z_loss * log_z_C
                    softmax_CV[torch.arange(len(hidden_CD), device=targets_C.device), targets_C] -= 1 / factors_C
                    scale_C1 = (weights_C * factors_C)[:, None]
                    gradient_CV = softmax_CV.to(dtype)
                    grad_hidden_ND[rows] = linear_input_gradient(gradient_CV, matrix_VD) * scale_C1
                    add_linear_weight_gradient(grad_output_VD, gradient_CV, (hidden_CD * scale_C1).to(dtype))
        if grad_hidden_ND is not None and grad_output_VD is not None:
            ctx.save_for_backward(grad_hidden_ND, grad_output_VD.to(output_VD.dtype))
        ctx.mark_non_differentiable(losses_N)
        return total, losses_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_output_VD = ctx.saved_tensors
        return grad_hidden_ND * gradients[0], grad_output_VD * gradients[0], None, None, None, None


def chunked_cross_entropy(
    hidden_ND: Tensor, output_VD: Tensor, targets_N: Tensor, weights_N: Tensor, z_loss: float = 0.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the tokens' cross-entropies, and the cross-entropy of each, nats.

    Args:
        hidden_ND: hidden states; their logits are ``hidden @ output.T``, computed in autocast's dtype if that is on.
        output_VD: the output matrix.
        targets_N: token ids.
        weights_N: weight of each token in the sum.
        z_loss: coefficient of ``(log Z)**2``, which is added to each token's loss in the sum.
        chunk: tokens of a chunk; by default as many as have :data:`CHUNK_ELEMENTS` logits.

    Returns:
        The sum, float32 and differentiable, and the cross-entropies (N,), float32, without z-loss and not differentiable.
    """
    if not torch.is_grad_enabled():  # inside of the function it never is, so that it asks whether its inputs need gradients
        hidden_ND, output_VD = hidden_ND.detach(), output_VD.detach()
    rows = chunk or max(1, CHUNK_ELEMENTS.get(hidden_ND.device.type, 1 << 26) // len(output_VD))
    if rows > ROWS_MULTIPLE:
        rows -= rows % ROWS_MULTIPLE
    total, losses_N = _ChunkedCrossEntropy.apply(hidden_ND, output_VD, targets_N, weights_N, z_loss, rows)
    return total, losses_N
