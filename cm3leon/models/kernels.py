"""The decoder's operations, each in the way that its device does fastest; what they compute is the same on all.

Most are here for CPUs, where PyTorch's own were found to be slow (docs/log.md). Where blocks are compiled, the compiler sees to that.
Shapes: B batch, T tokens, H heads, K head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS, LARGE_WEIGHT = 48, 1 << 19

SHORT = 256
"""Up to so many tokens attention on a CPU, where products are in bfloat16, holds all scores; longer sequences were not measured."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``.

    A few rows and a large matrix on a CPU, as in decoding, are multiplied from the other side: MKL does that a third faster. The result
    then lies in memory as its transpose, as the next product wants it.
    """
    few = x.device.type == "cpu" and x.numel() <= FEW_ROWS * x.shape[-1] and weight.numel() >= LARGE_WEIGHT
    if few and not torch.is_grad_enabled():
        return torch.mm(weight, x.flatten(0, -2).T).T.reshape(*x.shape[:-1], len(weight))
    return F.linear(x, weight)


class _Relu(torch.autograd.Function):
    """ReLU that overwrites its input, and in the backward pass its gradient: the widest tensors of a block are never copied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(x.relu_())
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        gradient = gradients[0]
        return torch.ops.aten.threshold_backward.grad_input(gradient, y, 0, grad_input=gradient)


def relu(x: Tensor) -> Tensor:
    """ReLU that overwrites its input."""
    return F.relu(x) if torch.compiler.is_compiling() else _Relu.apply(x)


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Pairs of neighbouring numbers of (..., K), each as one complex number, times those of ``turns`` (..., K / 2, 2); float32."""
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), turns.float().unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(turns.float())).flatten(-2)


class _Attention(torch.autograd.Function):
    """Causal attention by products of whole matrices, which keeps what each token weighs for the backward pass.

    Scores are float32, as a token is found by small differences of large scores; all behind them is ``v``'s dtype.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        shape, length = v.shape, v.shape[-2]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        causal = torch.full((length, length), -torch.inf).triu(1)
        weights = torch.baddbmm(causal, q, k.mT, alpha=scale).softmax(-1).to(v.dtype)
        ctx.save_for_backward(q.to(v.dtype), k.to(v.dtype), v, weights)
        ctx.scale = scale
        return torch.bmm(weights, v).view(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        shape = gradients[0].shape
        gradient = gradients[0].flatten(0, 1)
        of_scores = torch._softmax_backward_data(torch.bmm(gradient, v.mT), weights, -1, weights.dtype)
        of_q, of_k = (product.float().mul_(ctx.scale).view(shape) for product in (torch.bmm(of_scores, k), torch.bmm(of_scores.mT, q)))
        return of_q, of_k, torch.bmm(weights.mT, gradient).view(shape), None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention (B, H, T, K) of logits ``scale * q . k``, under a mask or causal, in ``v``'s dtype.

    In bfloat16 PyTorch's kernel for CPUs is slow in the backward pass: short causal sequences go by products of matrices, others through
    float32.
    """
    if v.device.type != "cpu":
        q, k = q.to(v.dtype), k.to(v.dtype)
    elif v.dtype != torch.float32:
        with torch.autocast("cpu", enabled=False):
            if mask is None and v.shape[-2] <= SHORT and not torch.compiler.is_compiling():
                return _Attention.apply(q.float(), k.float(), v, scale)
            mask = None if mask is None else mask if mask.dtype == torch.bool else mask.float()
            y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, is_causal=mask is None, scale=scale)
            return y.to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
