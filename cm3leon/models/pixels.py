"""Conversions between the uint8 pixels of images and the floats in [-1, 1] that networks take and give."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL import Image


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 of any shape, as float32 in [-1, 1]."""
    return pixels.float().div(127.5).sub(1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Floats of any shape, as uint8: [-1, 1] is mapped to [0, 255] and rounded; values outside are clamped."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def to_channels_first(pixels: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 (B, H, W, 3), as float32 (B, 3, H, W) in [-1, 1] on ``device``."""
    return to_unit(pixels.to(device).permute(0, 3, 1, 2)).contiguous()


def to_channels_last(images: torch.Tensor) -> torch.Tensor:
    """Floats (B, 3, H, W) in [-1, 1], as uint8 (B, H, W, 3) on the CPU."""
    return to_uint8(images).permute(0, 2, 3, 1).cpu()


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Floats (B, 3, H, W) in [-1, 1], as RGB images."""
    from PIL import Image

    return [Image.fromarray(array) for array in to_channels_last(images).numpy()]
