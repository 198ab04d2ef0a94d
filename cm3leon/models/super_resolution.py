"""The upscaler that runs after decoding: a small residual network on top of bicubic interpolation (EDSR, Lim et al. 2017).

It is trained by itself on the collection's own images: each is its own target, its bicubic reduction the input. Fidelity is measured on the
images before upscaling (paper).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import interpolate, l1_loss, pixel_shuffle

from cm3leon.config.schema import SuperResolutionConfig, UserError
from cm3leon.data.images import to_rgb
from cm3leon.data.pixels import ImageSet
from cm3leon.evaluation.restoration import WINDOW, psnr_y, ssim_y

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MOST_DECIBELS = 100.0
"""Of images that agree."""
CORRECTION_SCALE = 0.3
"""Of the network's output. It tames the first steps, so that a high learning rate does not begin by undoing the interpolation."""


class ResidualBlock(nn.Module):
    """Convolution, ReLU, convolution, no normalisation; starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.relu(self.first(x)))


class SuperResolution(nn.Module):
    """``(B, 3, h, w)`` in [-1, 1] to ``(B, 3, scale * h, scale * w)``: bicubic interpolation plus a learned correction.

    The correction starts at zero, so an untrained network is bicubic interpolation.
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

    def forward(self, low: torch.Tensor) -> torch.Tensor:
        features = self.head(low)
        correction = CORRECTION_SCALE * pixel_shuffle(self.tail(features + self.body(features)), self.scale)
        return interpolate(low, scale_factor=self.scale, mode="bicubic", align_corners=False) + correction

    @classmethod
    def load(cls, directory: str | Path) -> SuperResolution:
        """Read a network written by :meth:`save`.

        Raises:
            FileNotFoundError: if the directory holds none.
        """
        directory = Path(directory)
        for name in (CONFIG, WEIGHTS):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory / name}: no upscaler here; run: cm3leon super_resolution")
        model = cls(**json.loads((directory / CONFIG).read_text()))
        model.load_state_dict(load_file(directory / WEIGHTS))
        return model.eval()

    def save(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG).write_text(json.dumps(self.settings, indent=2, sort_keys=True) + "\n")
        save_file({name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}, directory / WEIGHTS)

    @torch.inference_mode()
    def upscale(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Images of any sizes, each ``scale`` times larger, RGB."""
        device = self.head.weight.device
        result = []
        for image in images:
            low = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)[None].to(device)
            result.append(Image.fromarray(to_bytes(self(to_unit(low)))[0].permute(1, 2, 0).cpu().numpy()))
        return result


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 to [-1, 1]."""
    return pixels.float().div(127.5).sub(1)


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to uint8, values outside clipped."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def reduce(pixels: torch.Tensor, scale: int) -> torch.Tensor:
    """uint8 ``(B, 3, H, W)`` reduced ``scale`` times by antialiased bicubic interpolation, rounded to uint8 as a stored image is.

    Raises:
        ValueError: if a side is not a multiple of ``scale``.
    """
    if pixels.shape[-1] % scale or pixels.shape[-2] % scale:
        raise ValueError(f"images of {pixels.shape[-2]}x{pixels.shape[-1]} pixels cannot be reduced {scale} times evenly")
    size = (pixels.shape[-2] // scale, pixels.shape[-1] // scale)
    return to_bytes(interpolate(to_unit(pixels), size=size, mode="bicubic", antialias=True, align_corners=False))


def psnr_rgb(originals: torch.Tensor, copies: torch.Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio, dB, over all three channels of uint8 ``(B, 3, H, W)``; 100 where they agree."""
    error = (originals.float() - copies.float()).square().mean(dim=(1, 2, 3))
    decibels = 10 * torch.log10(255**2 / error.clamp(min=1e-9))
    return float(decibels.clamp(max=MOST_DECIBELS).double().mean())


@torch.inference_mode()
def evaluate(model: SuperResolution, images: ImageSet, batch_size: int = 64) -> dict[str, list[float]]:
    """``psnr_rgb``, ``psnr_y`` and ``ssim_y`` of the network, and with ``_bicubic`` behind them those of plain interpolation, image
    for image, on reductions of ``images``; those of Y without a border as wide as the scale (``evaluation/restoration.py``)."""
    found: dict[str, list[float]] = defaultdict(list)
    device = model.head.weight.device
    for start in range(0, len(images), batch_size):
        high = torch.from_numpy(images[np.arange(start, min(start + batch_size, len(images)))]).permute(0, 3, 1, 2).to(device)
        low = to_unit(reduce(high, model.scale))
        bicubic = to_bytes(interpolate(low, scale_factor=model.scale, mode="bicubic", align_corners=False))
        for copies, suffix in ((to_bytes(model(low)), ""), (bicubic, "_bicubic")):
            found[f"psnr_rgb{suffix}"] += [psnr_rgb(high[i : i + 1], copies[i : i + 1]) for i in range(len(high))]
            pairs = [
                (one.permute(1, 2, 0).cpu().numpy(), other.permute(1, 2, 0).cpu().numpy()) for one, other in zip(high, copies, strict=True)
            ]
            found[f"psnr_y{suffix}"] += [min(psnr_y(*pair, model.scale), MOST_DECIBELS) for pair in pairs]
            if images.size - 2 * model.scale >= WINDOW:
                found[f"ssim_y{suffix}"] += [ssim_y(*pair, model.scale) for pair in pairs]
    return dict(found)


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
    warmup = max(1, config.steps // 10)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
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
