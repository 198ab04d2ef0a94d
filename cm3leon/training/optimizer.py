"""The decoder's optimizers, and the learning-rate schedule of every training run.

The paper does not publish its optimizer. AdamW is the usual choice; Muon for the hidden layers needs about half as many samples
(docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cm3leon.training.muon import Muon
from cm3leon.training.precision import autocast_dtype

if TYPE_CHECKING:
    from cm3leon.config.schema import TrainConfig


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or AdamW for the embeddings and Muon for the matrices of the blocks. Embeddings have no weight decay."""
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    known = {id(p) for p in embeddings}
    matrices = [p for p in model.parameters() if id(p) not in known]
    groups = [{"params": embeddings, "weight_decay": 0.0}]
    if config.optimizer == "adamw":
        groups.append({"params": matrices, "weight_decay": config.weight_decay})
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    if config.optimizer == "adamw":
        return [adamw]
    device = embeddings[0].device
    # On GPUs Newton-Schulz runs in bfloat16 even when the model computes in float32, as in the reference implementation.
    dtype = torch.bfloat16 if device.type == "cuda" else autocast_dtype(config, device)
    return [adamw, Muon(matrices, config.learning_rate, config.weight_decay, dtype=dtype)]


def learning_rate_at(step: int, *, peak: float, steps: int, warmup_steps: int, final: float = 0.0) -> float:
    """Linear warm-up to ``peak``, then cosine decay to ``final * peak``.

    Args:
        step: from 0; from ``steps`` on the rate is ``final * peak``.
        final: share of the peak at the end.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def allocate_states(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Give every parameter the optimizer state that it has before its first step, so that there is one to load a checkpoint into."""
    for optimizer in optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        set_learning_rate(optimizer, 0.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for state in optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()


def state_tensors(optimizers: Sequence[torch.optim.Optimizer], names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The states of optimizers by name, for a checkpoint: ``optimizer0.PARAMETER.KEY``.

    Args:
        names: of the parameters.
    """
    return {
        f"optimizer{number}.{names[parameter]}.{key}": tensor
        for number, optimizer in enumerate(optimizers)
        for parameter, states in optimizer.state.items()
        for key, tensor in states.items()
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
