"""The optimizers and the learning-rate schedule. The paper does not publish its optimizer: AdamW is the field's usual choice, and Muon for
the hidden layers needs about half as many samples (docs/log.md)."""

from __future__ import annotations

import math

import torch
from torch import nn

from cm3leon.config.schema import TrainConfig
from cm3leon.training.distributed import products_dtype
from cm3leon.training.muon import Muon


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or over the embeddings alone beside Muon over the matrices between them; embeddings are not decayed."""
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
    dtype = torch.bfloat16 if device.type == "cuda" else products_dtype(config, device)
    return [adamw, Muon(matrices, config.learning_rate, config.weight_decay, dtype=dtype)]


def learning_rate_at(step: int, *, peak: float, steps: int, warmup_steps: int, final: float = 0.0) -> float:
    """The schedule of every training run here: linear warm-up to ``peak``, then half a cosine down to ``final * peak``.

    Args:
        step: from 0; from ``steps`` on the rate stays at its end.
        final: share of the peak at the end.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of all of an optimizer's parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
