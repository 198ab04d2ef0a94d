"""PSNR and SSIM of the upscaler next to those of bicubic interpolation, on reductions of the collection's own images."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch.nn.functional import interpolate

from cm3leon.data.pixels import ImageSet
from cm3leon.evaluation.restoration import WINDOW, psnr_y, ssim_y
from cm3leon.models.super_resolution import SuperResolution, reduce
from cm3leon.utils.images import to_uint8, to_unit

MOST_DECIBELS = 100.0
"""Reported for images that agree, whose PSNR is infinite."""


def psnr_rgb(originals: torch.Tensor, copies: torch.Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio, dB, over all three channels of uint8 ``(B, 3, H, W)``; 100 where they agree."""
    error = (originals.float() - copies.float()).square().mean(dim=(1, 2, 3))
    decibels = 10 * torch.log10(255**2 / error.clamp(min=1e-9))
    return float(decibels.clamp(max=MOST_DECIBELS).double().mean())


@torch.inference_mode()
def measure_upscaling(model: SuperResolution, images: ImageSet, batch_size: int = 64) -> dict[str, list[float]]:
    """PSNR and SSIM of each image, upscaled from its bicubic reduction.

    Returns:
        ``psnr_rgb``, ``psnr_y`` and ``ssim_y`` of the network, and with the suffix ``_bicubic`` those of bicubic interpolation. Scores of Y
        leave out a border as wide as the scale (:mod:`cm3leon.evaluation.restoration`).
    """
    found: dict[str, list[float]] = defaultdict(list)
    device = model.head.weight.device
    for start in range(0, len(images), batch_size):
        high = torch.from_numpy(images[np.arange(start, min(start + batch_size, len(images)))]).permute(0, 3, 1, 2).to(device)
        low = to_unit(reduce(high, model.scale))
        bicubic = to_uint8(interpolate(low, scale_factor=model.scale, mode="bicubic", align_corners=False))
        for copies, suffix in ((to_uint8(model(low)), ""), (bicubic, "_bicubic")):
            found[f"psnr_rgb{suffix}"] += [psnr_rgb(high[i : i + 1], copies[i : i + 1]) for i in range(len(high))]
            pairs = [
                (one.permute(1, 2, 0).cpu().numpy(), other.permute(1, 2, 0).cpu().numpy()) for one, other in zip(high, copies, strict=True)
            ]
            found[f"psnr_y{suffix}"] += [min(psnr_y(*pair, model.scale), MOST_DECIBELS) for pair in pairs]
            if images.size - 2 * model.scale >= WINDOW:
                found[f"ssim_y{suffix}"] += [ssim_y(*pair, model.scale) for pair in pairs]
    return dict(found)
