"""Training of the upscaler: an image of the collection is the target, its bicubic reduction the input.

Shapes: B batch, h w low resolution, H W high resolution.
"""

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
    """Train on random crops, rotated and flipped, with an L1 loss (as EDSR, arXiv 1707.02921, section 4.2).

    The same arguments give the same weights on one machine.

    Raises:
        UserError: if there are no images, or they are smaller than ``scale`` pixels.
    """
    if not len(images):
        raise UserError("super-resolution has no images to train on")
    # Crops are patch_size pixels wide in the input, or the whole image where that is smaller.
    side = min(config.patch_size * config.scale, images.size // config.scale * config.scale)
    if side < config.scale:
        raise UserError(f"images of {images.size} pixels are too small for a scale of {config.scale}")
    torch.manual_seed(seed)
    model = SuperResolution(config.scale, config.channels, config.blocks).to(device).train()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    rng = np.random.default_rng(seed)
    for step in range(config.steps):
        rate = learning_rate_at(step, peak=config.learning_rate, steps=config.steps, warmup_steps=config.steps // 10)
        set_learning_rate(optimizer, rate)
        high_B3HW = torch.from_numpy(_crops(images, config.batch_size, side, rng)).permute(0, 3, 1, 2).to(device)
        low_B3hw = reduce(high_B3HW, config.scale)
        loss = l1_loss(model(to_unit(low_B3hw)), to_unit(high_B3HW))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step(step, float(loss.detach()))
    return model.eval()


def _crops(images: ImageSet, count: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 (count, side, side, 3): random crops of random images, each in one of the eight orientations of a square."""
    crops = []
    for image in images[rng.integers(len(images), size=count)]:
        top = rng.integers(image.shape[0] - side + 1)
        left = rng.integers(image.shape[1] - side + 1)
        rotated = np.rot90(image[top : top + side, left : left + side], int(rng.integers(4)))
        crops.append(rotated[:, ::-1] if rng.integers(2) else rotated)
    return np.stack(crops)
