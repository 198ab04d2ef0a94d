"""The decoder's operations, each in the form that is fastest on its device. All forms compute the same, up to rounding.

Most forms are for CPUs, where PyTorch's own kernels were measured to be slow (docs/log.md, ``benchmarks/operations.py``). Under
``torch.compile`` the plain form is used, which the compiler fuses.

Shapes: B batch, T tokens, H heads, K head dim, O outputs, I inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cm3leon.utils.device import prefers_onednn

MIN_FLIPPED_ROWS, MAX_FLIPPED_ROWS = 4, 48
MIN_FLIPPED_WEIGHT = 1 << 19
"""For this many rows of input, and from this many elements of the weight, :func:`linear` multiplies from the other side."""

IMAGES = 16
"""As so many images rows are convolved: PyTorch gives convolutions of fewer to MKL on a single thread."""

ROWS_MULTIPLE = 64
"""Where rows are convolved, those of a training step are filled up to a multiple of this: oneDNN compiles kernels for each new number."""

MIN_CONVOLVED_ROWS, MIN_CONVOLVED_ROWS_WIDE, WIDE_WEIGHT = 256, 512, 1 << 20
"""Fewer rows are not convolved, also not for the gradient of a weight of so many elements."""

MAX_PACKED_ROWS, EXACT_PACKED_ROWS, PACKED_ROWS_MULTIPLE = 256, 32, 16
"""Most rows that :func:`packed_linear` computes at once, and from which on it fills them up to a multiple: oneDNN keeps half a megabyte for
each number of rows that it has met."""

MIN_PACKED_WEIGHT = 1 << 16
"""Elements of a weight from which on packing it pays."""

EXPECTED_ROWS = 16
"""For about so many rows weights are packed; others take them too."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``: (..., I) and (O, I) to (..., O).

    Many rows are convolved where that is faster (:func:`convolves`). For a few rows and a large weight on a CPU, as in decoding,
    ``(weight @ x.T).T`` is a third faster with MKL; for two or three rows it takes twice as long. The result is then transposed in memory,
    which is the layout that the next product reads.
    """
    if _by_convolution(x):
        return _rows(F.conv2d(_pixels(x), weight[:, :, None, None])).view(*x.shape[:-1], len(weight))
    few_rows = MIN_FLIPPED_ROWS * x.shape[-1] <= x.numel() <= MAX_FLIPPED_ROWS * x.shape[-1]
    if x.device.type == "cpu" and few_rows and weight.numel() >= MIN_FLIPPED_WEIGHT and not torch.is_grad_enabled():
        return torch.mm(weight, x.flatten(0, -2).T).T.reshape(*x.shape[:-1], len(weight))
    return F.linear(x, weight)


def linear_input_gradient(gradient_TO: Tensor, weight: Tensor) -> Tensor:
    """The gradient (T, I) of the input of :func:`linear` from that of its output."""
    if not _by_convolution(gradient_TO):
        return gradient_TO @ weight
    unread_TI = gradient_TO.new_empty(len(gradient_TO), weight.shape[1])  # only its shape matters
    return _rows(_convolution_gradients(gradient_TO, unread_TI, weight, (True, False, False))[0])


def add_linear_weight_gradient(total_OI: Tensor, gradient_TO: Tensor, x_TI: Tensor) -> None:
    """Add to ``total`` the gradient of the weight of :func:`linear`."""
    few_rows = len(x_TI) < MIN_CONVOLVED_ROWS_WIDE and total_OI.numel() >= WIDE_WEIGHT
    if _by_convolution(x_TI) and not few_rows:
        total_OI += _convolution_gradients(gradient_TO, x_TI, total_OI, (False, True, False))[1].view_as(total_OI)
    elif gradient_TO.dtype == total_OI.dtype:
        total_OI.addmm_(gradient_TO.T, x_TI)
    else:
        total_OI += gradient_TO.T @ x_TI


def packing_pays(weight: Tensor) -> bool:
    """Whether :func:`packed_linear` is faster than :func:`linear` for a few rows, 1.6 to 4 times (``benchmarks/operations.py``)."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= MIN_PACKED_WEIGHT and prefers_onednn()


def pack_weight(weight: Tensor) -> Tensor:
    """A float32 weight (O, I) as oneDNN lays it out for :func:`packed_linear`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, EXPECTED_ROWS)


def packed_linear(x: Tensor, packed: Tensor) -> Tensor:
    """:func:`linear` by a weight of :func:`pack_weight`, without gradients."""
    parts = []
    for part in x.flatten(0, -2).split(MAX_PACKED_ROWS):
        missing = -len(part) % PACKED_ROWS_MULTIPLE if len(part) > EXACT_PACKED_ROWS else 0
        filled = F.pad(part, (0, 0, 0, missing)) if missing else part
        parts.append(torch.ops.mkldnn._linear_pointwise(filled, packed, None, "none", [], "")[: len(part)])
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*x.shape[:-1], len(packed))


def convolves(device: torch.device) -> bool:
    """Whether products of many rows are computed as convolutions, of images of one column with a channel for each input.

    PyTorch gives matrix products in float32 to MKL and convolutions to oneDNN, which is up to 2.3 times as fast on some processors
    (docs/log.md).
    """
    return not torch.compiler.is_compiling() and device.type == "cpu" and not torch.is_autocast_enabled("cpu") and prefers_onednn()


def _by_convolution(x: Tensor) -> bool:
    if torch.compiler.is_compiling():  # first: under a compiler what is asked of the rows would be a guard
        return False
    rows = x.numel() // x.shape[-1]
    return rows >= MIN_CONVOLVED_ROWS and rows % IMAGES == 0 and x.dtype == torch.float32 and convolves(x.device)


def _convolution_gradients(gradient_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, ...]:
    """Of input, weight and bias, those wanted."""
    pixels = _pixels(gradient_TO), _pixels(x_TI), weight_OI[:, :, None, None]
    return torch.ops.aten.convolution_backward(*pixels, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, wanted)


def _pixels(x: Tensor) -> Tensor:
    """Rows (..., I) as images (IMAGES, I, rows / IMAGES, 1) whose channels are last in memory."""
    return x.reshape(IMAGES, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


def _rows(images: Tensor) -> Tensor:
    """The reverse of :func:`_pixels`: (rows, channels)."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


class _Relu(torch.autograd.Function):
    """In-place ReLU whose backward pass overwrites the gradient too: a block's widest activations are never copied."""

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
    """ReLU, in place unless compiled."""
    return F.relu(x) if torch.compiler.is_compiling() else _Relu.apply(x)


def apply_rotary_emb(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate each pair of adjacent elements of ``x`` (..., K) by the angle whose cosine and sine are in ``cos_sin`` (..., K / 2, 2).

    Computed in float32, as a product of complex numbers where it is not compiled.
    """
    if torch.compiler.is_compiling():
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos_sin.float().unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(cos_sin.float())).flatten(-2)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None = None, longest: int = 0) -> Tensor:
    """Causal scaled dot-product attention (B, H, T, K) in ``v``'s dtype; logits are ``scale * q . k``.

    Args:
        cu_seqlens: of packed samples (samples + 1,) int32, for B = 1: where each begins, and where the last ends. Attention stays within a
            sample, without a mask: on a GPU in half precision one kernel takes samples of any lengths, elsewhere each is computed alone.
        longest: with ``cu_seqlens``, a bound on the length of a sample.
    """
    if cu_seqlens is None:
        return _causal_attention(q, k, v, scale)
    if v.device.type == "cuda" and v.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn  # takes a second to import

        q, k, v = (x[0].transpose(0, 1) for x in (q.to(v.dtype), k.to(v.dtype), v))  # (T, H, K)
        y = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=(-1, 0))
        assert isinstance(y, Tensor)  # without log-sum-exps
        return y.transpose(0, 1)[None]
    return _attention_by_sample(q, k, v, scale, cu_seqlens)


def _attention_by_sample(q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor) -> Tensor:
    lengths = cu_seqlens.diff().tolist()
    samples = zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
    return torch.cat([_causal_attention(q, k, v, scale) for q, k, v in samples], 2)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention over whole rows.

    PyTorch's CPU kernel is slow in the backward pass in bfloat16, and attending to one token takes small differences of large scores: on a
    CPU attention is computed in float32.
    """
    if v.device.type != "cpu":
        q, k = q.to(v.dtype), k.to(v.dtype)
    elif v.dtype != torch.float32:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True, scale=scale).to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
