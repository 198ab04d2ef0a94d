"""Muon: momentum whose update of each matrix is made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

The same update as ``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"`` (Liu et al. 2025, arXiv 2502.16982), which a test compares
it with. It is written here for two reasons: that one always computes in bfloat16, which a CPU without bfloat16 kernels does some thirty
times slower, and one matrix at a time, while the layers of a decoder have matrices of a few shapes, upright or lying, that can go
through together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: steepest at zero, so that small singular values grow fast."""
ITERATIONS = 5
UPDATE_RMS = 0.2
"""Root mean square of an update at learning rate 1, about that of AdamW's."""


def orthogonalize(matrices_NRC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bring the singular values of each matrix near 1 by five Newton-Schulz iterations, computed in ``dtype``; same shape and dtype."""
    a, b, c = COEFFICIENTS
    wide = matrices_NRC.shape[-2] <= matrices_NRC.shape[-1]
    x = matrices_NRC if wide else matrices_NRC.mT
    x = x.to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices_NRC.dtype)


class Muon(torch.optim.Optimizer):
    """For the matrices of the hidden layers; embeddings want AdamW.

    Args:
        params: matrices, and convolutions, which count as matrices of outputs by everything else.
        lr: as one would give AdamW for them, or a few times more.
        weight_decay: decoupled.
        momentum: of Nesterov's kind.
        dtype: that the iterations are computed in; bfloat16 is enough, where the device is fast in it.

    Raises:
        ValueError: if a parameter has fewer than two dimensions.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(f"Muon takes matrices, found a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: defaultdict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[tuple(sorted((parameter.shape[0], parameter.shape[1:].numel())))].append(parameter)
            for shape, parameters in by_shape.items():
                rate = group["lr"] * UPDATE_RMS * math.sqrt(shape[1])
                directions = [_whole(self._direction(p, group["momentum"])).flatten(1) for p in parameters]
                lying = torch.stack([direction if direction.shape == shape else direction.mT for direction in directions])
                for parameter, update in zip(parameters, orthogonalize(lying, self.dtype), strict=True):
                    update = (update if parameter.shape[0] == shape[0] else update.mT).reshape(parameter.shape)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(_sharded_as(parameter, update), alpha=-rate)
        return loss

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """Nesterov's look-ahead of the gradient's running mean."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)


def _whole(tensor: Tensor) -> Tensor:
    """A matrix can only be made orthogonal whole: shards are brought together, on every process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _sharded_as(parameter: Tensor, update: Tensor) -> Tensor:
    if not hasattr(parameter, "full_tensor"):
        return update
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)
