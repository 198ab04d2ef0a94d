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

MANY = 1 << 16
"""From so many numbers on, short vectors are standardised all together on a CPU."""

SHORT = 512
"""Up to so many tokens attention in bfloat16 on a CPU holds all scores, which then are few enough for its caches."""


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


class _Standardize(torch.autograd.Function):
    """LayerNorm without parameters by operations on all vectors at once; PyTorch's goes through them one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x - x.mean(-1, keepdim=True)
        scale = y.square().mean(-1, keepdim=True).add_(1e-5).rsqrt_()
        ctx.save_for_backward(y.mul_(scale), scale)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        gradient = gradients[0]
        along = (gradient * y).mean(-1, keepdim=True)
        return (gradient - gradient.mean(-1, keepdim=True)).addcmul_(y, along, value=-1).mul_(scale)


def standardize(x: Tensor) -> Tensor:
    """Each vector of the last axis brought to mean 0 and variance 1: LayerNorm (arXiv 1607.06450) without parameters, of heads."""
    if x.device.type != "cpu" or x.numel() < MANY or torch.compiler.is_compiling():
        return F.layer_norm(x, x.shape[-1:])
    return _Standardize.apply(x.float())


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Pairs of neighbouring numbers of (..., K), each as one complex number, times those of ``turns`` (..., K / 2, 2)."""
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), turns.to(x.dtype).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(turns.float())).flatten(-2).to(x.dtype)


class _Attention(torch.autograd.Function):
    """Attention by products of whole matrices, which keeps what each token weighs for the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        shape = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        if mask.ndim == 2:
            scores = torch.baddbmm(mask, q, k.mT, alpha=scale)
        else:
            scores = torch.bmm(q * scale, k.mT).view(*shape[:-1], -1).add_(mask).flatten(0, 1)
        weights = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return torch.bmm(weights, v).view(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        shape = gradients[0].shape
        gradient = gradients[0].flatten(0, 1)
        of_scores = torch._softmax_backward_data(torch.bmm(gradient, v.mT), weights, -1, weights.dtype)
        of_q, of_k = torch.bmm(of_scores, k).mul_(ctx.scale), torch.bmm(of_scores.mT, q).mul_(ctx.scale)
        return of_q.view(shape), of_k.view(shape), torch.bmm(weights.mT, gradient).view(shape), None, None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention (B, H, T, K) of logits ``scale * q . k``, under a mask or causal.

    In bfloat16 PyTorch's kernel for CPUs is slow in the backward pass: short sequences go by products of matrices, long ones through
    float32.
    """
    if q.device.type != "cpu" or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    length = q.shape[-2]
    with torch.autocast("cpu", enabled=False):
        if length > SHORT or torch.compiler.is_compiling():
            mask = None if mask is None else mask if mask.dtype == torch.bool else mask.float()
            y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, is_causal=mask is None, scale=scale)
            return y.to(q.dtype)
        if mask is None:
            mask = torch.full((length, length), -torch.inf, dtype=q.dtype).triu(1)
        elif mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        return _Attention.apply(q, k, v, mask.to(q.dtype), scale)
