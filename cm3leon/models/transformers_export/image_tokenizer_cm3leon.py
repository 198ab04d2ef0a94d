"""The image tokenizer of a CM3leon: a VQ-GAN (arXiv 2012.09841, 2203.13131) that makes codes of pixels and pixels of codes.

Shapes: B batch, C channels, H W pixels, h w tokens of an image, N latents, D their dimensions, E entries of the codebook.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_cm3leon import Cm3leonConfig


class ChannelNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467) over the channels of each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW * torch.rsqrt(x_BCHW.square().mean(1, keepdim=True) + 1e-6) * self.scale


class ResidualBlock(nn.Module):
    """``x + out(SiLU(conv(norm(x))))``."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.out(F.silu(self.conv(self.norm(x_BCHW))))


class Encoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to latents (B, D, h, w)."""

    def __init__(self, config: Cm3leonConfig) -> None:
        super().__init__()
        spec = config.image_tokenizer
        widths = [spec["channels"] * multiplier for multiplier in spec["multipliers"]]
        layers: list[nn.Module] = [nn.PixelUnshuffle(spec["patch"]), nn.Conv2d(3 * spec["patch"] ** 2, widths[0], 1)]
        for level, width in enumerate(widths):
            if level:
                layers += [nn.PixelUnshuffle(2), nn.Conv2d(4 * widths[level - 1], width, 1)]
            layers += [ResidualBlock(width, spec["encoder_kernel"]) for _ in range(spec["blocks"])]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], spec["embedding_dim"], 1))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.layers(images_B3HW)


class Decoder(nn.Module):
    """Latents (B, D, h, w) to images (B, 3, H, W), about in [-1, 1]."""

    def __init__(self, config: Cm3leonConfig) -> None:
        super().__init__()
        spec = config.image_tokenizer
        widths = [spec["channels"] * multiplier for multiplier in reversed(spec["multipliers"])]
        layers: list[nn.Module] = [nn.Conv2d(spec["embedding_dim"], widths[0], 1)]
        for level, width in enumerate(widths):
            if level:
                layers += [nn.Conv2d(widths[level - 1], 4 * width, 1), nn.PixelShuffle(2)]
            layers += [ResidualBlock(width, 3) for _ in range(spec["decoder_blocks"])]
        self.layers = nn.Sequential(*layers)
        self.output = nn.Conv2d(widths[-1], 3 * spec["patch"] ** 2, 1)
        self.shuffle = nn.PixelShuffle(spec["patch"])

    def forward(self, z_BDhw: Tensor) -> Tensor:
        return self.shuffle(self.output(self.layers(z_BDhw)))


class ImageTokenizer(nn.Module):
    """uint8 images (B, H, W, 3) <-> codes (B, h * w) in raster order."""

    used: Tensor

    def __init__(self, config: Cm3leonConfig) -> None:
        super().__init__()
        spec = config.image_tokenizer
        self.side, self.size = config.image_side, spec["image_size"]
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.codebook = nn.Embedding(spec["codebook_size"], spec["embedding_dim"])
        self.register_buffer("used", torch.ones(spec["codebook_size"], dtype=torch.bool))

    @torch.no_grad()
    def encode(self, images_BHW3: Tensor) -> Tensor:
        """Codes of images: of each latent, the index of the nearest entry that training used.

        Raises:
            ValueError: if the images are not uint8 (B, image_size, image_size, 3).
        """
        if images_BHW3.dtype != torch.uint8 or images_BHW3.ndim != 4 or images_BHW3.shape[1:] != (self.size, self.size, 3):
            found = f"{images_BHW3.dtype} {tuple(images_BHW3.shape)}"
            raise ValueError(f"expected images as uint8 (B, {self.size}, {self.size}, 3), found {found}; crop and resize them first")
        entries_ED = self.codebook.weight
        pixels_B3HW = images_BHW3.to(entries_ED.device).permute(0, 3, 1, 2).contiguous().to(entries_ED.dtype).div(127.5).sub(1)
        z_ND = self.encoder(pixels_B3HW).permute(0, 2, 3, 1).reshape(-1, entries_ED.shape[1])
        # argmin |z - e|^2 = argmax (z e - |e|^2 / 2), as |z|^2 is the same for all entries.
        halves_E = (0.5 * entries_ED.square().sum(1)).masked_fill(~self.used, torch.inf)
        codes_N = (z_ND @ entries_ED.T - halves_E).argmax(-1)
        return codes_N.view(len(images_BHW3), -1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images of codes, on the CPU."""
        z_BDhw = self.codebook(codes).unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2).contiguous()
        pixels_B3HW = self.decoder(z_BDhw).float().clamp(-1, 1)
        return pixels_B3HW.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
