"""AdamW and the learning-rate schedule. The paper does not publish its optimiser; these are the field's usual choices."""

from __future__ import annotations

import math

import torch
from torch import nn

from cm3leon.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; embeddings are not decayed."""
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    known = {id(p) for p in embeddings}
    matrices = [p for p in model.parameters() if id(p) not in known]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": embeddings, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up to the peak, then a cosine to ``final_learning_rate`` times the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    return config.learning_rate * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)
