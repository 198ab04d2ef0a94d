"""PSNR and SSIM of the super-resolution network and of bicubic interpolation, its baseline, on downsampled images of the collection."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch.nn.functional import interpolate

from cm3leon.data.pixels import ImageSet, batches_of
from cm3leon.evaluation.restoration import WINDOW, psnr_y, ssim_y
from cm3leon.models.pixels import to_uint8, to_unit
from cm3leon.models.super_resolution import SuperResolution, reduce

MOST_DECIBELS = 100.0
"""Upper bound of PSNR, which is infinite for equal images."""


def psnr_rgb(originals: torch.Tensor, restored: torch.Tensor) -> float:
    """Peak signal-to-noise ratio over all three channels, dB, at most 100, averaged over images: uint8 ``(B, 3, H, W)`` each."""
    error = (originals.float() - restored.float()).square().mean(dim=(1, 2, 3))
    decibels = 10 * torch.log10(255**2 / error.clamp(min=1e-9))
    return float(decibels.clamp(max=MOST_DECIBELS).double().mean())


@torch.inference_mode()
def restoration_scores(model: SuperResolution, images: ImageSet, batch_size: int = 64) -> dict[str, list[float]]:
    """Restore downsampled images, and compare them with the originals.

    Scores on Y leave out a border as wide as the scale (:mod:`cm3leon.evaluation.restoration`). Images smaller than SSIM's window have no
    SSIM.

    Returns:
        ``psnr_rgb``, ``psnr_y`` (dB) and ``ssim_y`` of each image for the network, and, with the suffix ``_bicubic``, for interpolation.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    device = model.head.weight.device
    positions = (np.arange(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size))
    for high_BHW3 in batches_of(images, positions):
        high = torch.from_numpy(high_BHW3).permute(0, 3, 1, 2).to(device)
        low = to_unit(reduce(high, model.scale))
        bicubic = to_uint8(interpolate(low, scale_factor=model.scale, mode="bicubic", align_corners=False))
        for restored, suffix in ((to_uint8(model(low)), ""), (bicubic, "_bicubic")):
            scores[f"psnr_rgb{suffix}"] += [psnr_rgb(high[i : i + 1], restored[i : i + 1]) for i in range(len(high))]
            pairs = [
                (original.permute(1, 2, 0).cpu().numpy(), copy.permute(1, 2, 0).cpu().numpy())
                for original, copy in zip(high, restored, strict=True)
            ]
            scores[f"psnr_y{suffix}"] += [min(psnr_y(*pair, model.scale), MOST_DECIBELS) for pair in pairs]
            if images.size - 2 * model.scale >= WINDOW:
                scores[f"ssim_y{suffix}"] += [ssim_y(*pair, model.scale) for pair in pairs]
    return dict(scores)
