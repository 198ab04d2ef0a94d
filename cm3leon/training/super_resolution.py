"""Training of the upscaler: each image of the collection is its own target, its bicubic reduction the input."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn.functional import l1_loss

from cm3leon.config.schema import SuperResolutionConfig
from cm3leon.data.pixels import ImageSet
from cm3leon.models.super_resolution import SuperResolution, reduce
from cm3leon.training.optimizer import learning_rate_at, set_learning_rate
from cm3leon.utils.errors import UserError
from cm3leon.utils.images import to_unit


def train(
    config: SuperResolutionConfig,
    images: ImageSet,
    seed: int,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> SuperResolution:
    """Train on random crops, turned and mirrored, under an L1 loss. The same arguments give the same weights on one machine.

    Raises:
        UserError: if there are no images, or they are too small to be reduced ``scale`` times.
    """
    if not len(images):
        raise UserError("super-resolution has no images to train on")
    side = min(config.patch_size * config.scale, images.size // config.scale * config.scale)
    if side < config.scale:
        raise UserError(f"images of {images.size} pixels are too small for a scale of {config.scale}")
    torch.manual_seed(seed)
    model = SuperResolution(config.scale, config.channels, config.blocks).to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    rng = np.random.default_rng(seed)
    for step in range(config.steps):
        rate = learning_rate_at(step, peak=config.learning_rate, steps=config.steps, warmup_steps=config.steps // 10)
        set_learning_rate(optimizer, rate)
        high = torch.from_numpy(_crops(images, config.batch_size, side, rng)).permute(0, 3, 1, 2).to(device)
        loss = l1_loss(model(to_unit(reduce(high, config.scale))), to_unit(high))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step(step, float(loss.detach()))
    return model.eval()


def _crops(images: ImageSet, count: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 ``(count, side, side, 3)``: random crops of random images in one of the eight orientations."""
    picked = images[rng.integers(len(images), size=count)]
    crops = []
    for image in picked:
        top, left = rng.integers(image.shape[0] - side + 1), rng.integers(image.shape[1] - side + 1)
        crop = np.rot90(image[top : top + side, left : left + side], int(rng.integers(4)))
        crops.append(crop[:, ::-1] if rng.integers(2) else crop)
    return np.stack(crops)
