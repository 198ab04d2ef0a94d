"""Muon: momentum with each matrix's update orthogonalized (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

For a matrix W with gradient G, learning rate eta, momentum mu and weight decay lambda:

    M <- mu M + (1 - mu) G                        running mean of the gradient
    N  = mu M + (1 - mu) G                        Nesterov's look-ahead
    O  = newton_schulz(N)                         about U V^T, where N = U S V^T
    W <- (1 - eta lambda) W - 0.2 eta sqrt(max(rows, columns)) O

The last factor gives updates the root mean square of AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that both optimizers
share one learning rate.

These are the updates of ``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"``, with which a test compares them. That class always
computes in bfloat16, which is about thirty times slower on a CPU without bfloat16 instructions, and one matrix at a time, whereas a
decoder's matrices have few shapes and can be orthogonalized in batches.

Shapes: N matrices, R rows, C columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from cm3leon.training.distributed import full_tensor, shard_like

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the quintic ``a s + b s**3 + c s**5`` that each iteration applies to the singular values (Jordan et al.): as steep as possible
at zero, so that small singular values grow fast. They end near 1, not at 1."""
ITERATIONS = 5
UPDATE_RMS = 0.2
"""Root mean square of an update's elements at learning rate 1, about that of AdamW's."""


def orthogonalize(matrices_NRC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bring the singular values of each matrix near 1 by Newton-Schulz iterations, computed in ``dtype``; same shape and dtype.

    With X = U S V^T, one iteration ``X <- a X + (b A + c A A) X``, ``A = X X^T``, maps each singular value s to ``a s + b s**3 + c s**5``
    and leaves U and V as they are.
    """
    a, b, c = COEFFICIENTS
    # 1. Wide orientation: A is then R x R with R the smaller side.
    wide = matrices_NRC.shape[-2] <= matrices_NRC.shape[-1]
    x = matrices_NRC if wide else matrices_NRC.mT
    # 2. Singular values to [0, 1], where the iteration converges: the Frobenius norm is at least the largest of them.
    x = x.to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    # 3. Iterate.
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices_NRC.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of the hidden layers; embeddings are for AdamW.

    Args:
        params: matrices, and convolutions, which are taken as matrices (output channels, all other dimensions).
        lr: as for AdamW, or a few times as much.
        weight_decay: decoupled.
        momentum: mu above.
        dtype: of the Newton-Schulz iterations; bfloat16 is precise enough where it is fast.

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
            # Matrices of one shape, transposed or not, are orthogonalized as one batch.
            by_shape: defaultdict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    rows, columns = parameter.shape[0], parameter.shape[1:].numel()
                    by_shape[min(rows, columns), max(rows, columns)].append(parameter)
            for shape, parameters in by_shape.items():
                self._update(group, shape, parameters)
        return loss

    def _update(self, group: dict[str, Any], shape: tuple[int, int], parameters: list[Tensor]) -> None:
        """Update parameters that are matrices of ``shape`` or its transpose; ``shape`` is wide."""
        # 1. Momentum, on each process's own shard; only whole matrices can be orthogonalized, so the shards are gathered.
        directions = [full_tensor(self._direction(parameter, group["momentum"])).flatten(1) for parameter in parameters]
        # 2. One batch of wide matrices.
        wide_NRC = torch.stack([direction if direction.shape == shape else direction.mT for direction in directions])
        updates_NRC = orthogonalize(wide_NRC, self.dtype)
        # 3. Back to each parameter's own shape and shard, and decoupled weight decay.
        rate = group["lr"] * UPDATE_RMS * math.sqrt(shape[1])
        for parameter, update_RC in zip(parameters, updates_NRC, strict=True):
            update = (update_RC if parameter.shape[0] == shape[0] else update_RC.mT).reshape(parameter.shape)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(shard_like(parameter, update), alpha=-rate)

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """Update the running mean M; returns Nesterov's look-ahead N."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)
