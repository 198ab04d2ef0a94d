"""The upscaler that runs after the image tokenizer's decoder: bicubic interpolation plus a small residual network.

The network is EDSR's (Lim et al. 2017, arXiv 1707.02921), smaller: residual blocks without normalization, and upsampling by pixel shuffle.
It is trained separately, on the collection's own images (``training/super_resolution.py``). FID is measured on images before upscaling, as
in the paper.

Shapes: B batch, C channels, h w low resolution, H W high resolution, H = scale * h; S = scale * scale.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import interpolate, pixel_shuffle

from cm3leon.data.images import to_rgb
from cm3leon.models.pixels import to_pil, to_uint8, to_unit
from cm3leon.utils.files import read_file, read_json

if TYPE_CHECKING:
    import pandas as pd

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MADE_BY = "cm3leon super_resolution"
CORRECTION_SCALE = 0.3
"""Factor of the network's output. It keeps the first steps of a high learning rate from destroying the interpolated image."""


class ResidualBlock(nn.Module):
    """Convolution, ReLU, convolution, without normalization; the identity at initialization, as the second convolution is zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x_BChw: torch.Tensor) -> torch.Tensor:
        return x_BChw + self.second(torch.relu(self.first(x_BChw)))


class SuperResolution(nn.Module):
    """(B, 3, h, w) in [-1, 1] to (B, 3, H, W): bicubic interpolation plus a learned correction.

    The correction is zero at initialization, so an untrained network is bicubic interpolation.
    """

    def __init__(self, scale: int, channels: int, blocks: int) -> None:
        super().__init__()
        self.settings = {"scale": scale, "channels": channels, "blocks": blocks}
        self.scale = scale
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(*[ResidualBlock(channels) for _ in range(blocks)])
        self.tail = nn.Conv2d(channels, 3 * scale * scale, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]

    def forward(self, low_B3hw: torch.Tensor) -> torch.Tensor:
        features_BChw = self.head(low_B3hw)
        subpixels_B3Shw = self.tail(features_BChw + self.body(features_BChw))  # 3 * S channels
        correction_B3HW = CORRECTION_SCALE * pixel_shuffle(subpixels_B3Shw, self.scale)
        return interpolate(low_B3hw, scale_factor=self.scale, mode="bicubic", align_corners=False) + correction_B3HW

    @classmethod
    def load(cls, directory: str | Path) -> SuperResolution:
        """Read a network written by :meth:`save`.

        Raises:
            FileNotFoundError: if the directory holds none.
            DamagedFileError: if a file of it is truncated.
        """
        directory = Path(directory)
        for name in (CONFIG, WEIGHTS):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory / name}: no upscaler here; run: {MADE_BY}")
        model = cls(**read_file(directory / CONFIG, read_json, MADE_BY))
        model.load_state_dict(read_file(directory / WEIGHTS, load_file, MADE_BY))
        return model.eval()

    def save(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG).write_text(json.dumps(self.settings, indent=2, sort_keys=True) + "\n")
        save_file({name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}, directory / WEIGHTS)

    @torch.inference_mode()
    def upscale(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Images of any sizes as RGB images, ``scale`` times as wide and high."""
        device = self.head.weight.device
        result = []
        for image in images:
            low_13hw = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)[None].to(device)
            result += to_pil(self(to_unit(low_13hw)))
        return result


def target_side(manifest: pd.DataFrame, image_size: int, scale: int) -> int:
    """Side of the high-resolution training images, pixels, a multiple of ``scale``.

    It is the side of upscaled outputs, ``image_size * scale``, or less where more than half of the collection's images are smaller:
    an image enlarged to its own target would teach the network to blur.
    """
    available = int(manifest[["width", "height"]].min(axis=1).median())
    return max(scale, min(image_size * scale, available) // scale * scale)


def reduce(pixels: torch.Tensor, scale: int) -> torch.Tensor:
    """uint8 (B, 3, H, W) to (B, 3, h, w) by antialiased bicubic interpolation, rounded to uint8 like a stored image.

    Raises:
        ValueError: if a side is not a multiple of ``scale``.
    """
    if pixels.shape[-1] % scale or pixels.shape[-2] % scale:
        raise ValueError(f"images of {pixels.shape[-2]}x{pixels.shape[-1]} pixels cannot be reduced {scale} times evenly")
    size = (pixels.shape[-2] // scale, pixels.shape[-1] // scale)
    return to_uint8(interpolate(to_unit(pixels), size=size, mode="bicubic", antialias=True, align_corners=False))
