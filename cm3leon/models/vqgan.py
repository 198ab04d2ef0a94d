"""The image tokenizer: a VQ-GAN autoencoder, images <-> grids of codes.

The family of Make-A-Scene and taming-transformers (arXiv 2203.13131, 2012.09841): a convolutional encoder, a codebook, a mirrored
decoder. Two departures make it learn in minutes: with ``patch`` > 1 the image is pixel-unshuffled first, so that no convolution runs at
full resolution; and there is no normalization outside the residual branches, which start silent, so that the network begins as a linear
map of patches and flat colors pass at once (docs/log.md has the figures).

Shapes: B batch, C channels, H W pixels, h w tokens; downsampling f = patch * 2 ** (levels - 1), h = H / f.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cm3leon.utils.images import to_channels_first, to_channels_last


@dataclass(frozen=True)
class ImageTokenizerSpec:
    """What it takes to build the network again; stored beside the weights as ``config.json``."""

    image_size: int
    patch: int
    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    decoder_blocks: int
    embedding_dim: int
    codebook_size: int
    encoder_kernel: int = 3

    @property
    def downsampling(self) -> int:
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def side(self) -> int:
        """Tokens along one side of an image."""
        return self.image_size // self.downsampling

    @property
    def tokens_per_image(self) -> int:
        return self.side**2


class ChannelNorm(nn.Module):
    """Root-mean-square normalization over the channels of each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.scale


class ResidualBlock(nn.Module):
    """x + 1x1(SiLU(3x3(norm(x)))); the identity at first, since the 1x1 convolution starts at zero. ``kernel`` is 3, or another side."""

    def __init__(self, channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.norm, self.conv, self.out = (
            ChannelNorm(channels),
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.silu(self.conv(self.norm(x))))


def start_linear(network: nn.Module) -> None:
    """Orthogonal 1x1 convolutions and silent residual blocks: at first the network is a rotation of patches, which keeps colors."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.bias)
            if module.kernel_size == (1, 1):
                nn.init.orthogonal_(module.weight.view(module.out_channels, -1))
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.out.weight)


class Encoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> (B, embedding_dim, h, w).

    With ``encoder_kernel`` 1 a latent sees its own patch alone, so that equal patches have equal codes, whatever lies around them.
    """

    def __init__(self, spec: ImageTokenizerSpec) -> None:
        super().__init__()
        widths = [spec.channels * m for m in spec.multipliers]
        layers: list[nn.Module] = [nn.PixelUnshuffle(spec.patch), nn.Conv2d(3 * spec.patch**2, widths[0], 1)]
        for level, width in enumerate(widths):
            if level:
                layers += [nn.PixelUnshuffle(2), nn.Conv2d(4 * widths[level - 1], width, 1)]
            layers += [ResidualBlock(width, spec.encoder_kernel) for _ in range(spec.blocks)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], spec.embedding_dim, 1))
        start_linear(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Decoder(nn.Module):
    """(B, embedding_dim, h, w) -> (B, 3, H, W), about [-1, 1]."""

    def __init__(self, spec: ImageTokenizerSpec) -> None:
        super().__init__()
        widths = [spec.channels * m for m in reversed(spec.multipliers)]
        layers: list[nn.Module] = [nn.Conv2d(spec.embedding_dim, widths[0], 1)]
        for level, width in enumerate(widths):
            if level:
                layers += [nn.Conv2d(widths[level - 1], 4 * width, 1), nn.PixelShuffle(2)]
            layers += [ResidualBlock(width) for _ in range(spec.decoder_blocks)]
        self.layers = nn.Sequential(*layers)
        self.output = nn.Conv2d(widths[-1], 3 * spec.patch**2, 1)
        self.shuffle = nn.PixelShuffle(spec.patch)
        start_linear(self)

    def forward(self, latents: Tensor) -> Tensor:
        return self.shuffle(self.output(self.layers(latents)))


class Codebook(nn.Module):
    """Nearest-neighbor quantization, the entries learned by exponential moving averages (van den Oord et al. 2017, arXiv 1711.00937,
    appendix A). They start as k-means of encoder outputs (:meth:`initialize`); against collapse, entries that are used too seldom are
    restarted where the codebook says least (:meth:`restart`).
    """

    entries: Tensor
    usage: Tensor
    sums: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        entries = torch.randn(size, dim)
        self.register_buffer("entries", entries)
        self.register_buffer("usage", torch.ones(size), persistent=False)
        self.register_buffer("sums", entries.clone(), persistent=False)

    def nearest(self, z_ND: Tensor) -> Tensor:
        """Index of the entry nearest to each row."""
        return (z_ND @ self.entries.T - 0.5 * self.entries.square().sum(1)).argmax(-1)

    def lookup(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.entries)

    @torch.no_grad()
    def initialize(self, z_ND: Tensor, generator: torch.Generator, iterations: int = 10) -> None:
        """k-means of encoder outputs, seeded as k-means++: each entry at an output drawn in proportion to its squared error so far."""
        error_N = torch.full((len(z_ND),), torch.inf)
        weights_N = torch.ones(len(z_ND))
        for index in range(len(self.entries)):
            pick = int(torch.multinomial(weights_N, 1, generator=generator))
            self.entries[index] = z_ND[pick]
            error_N = torch.minimum(error_N, (z_ND - z_ND[pick]).square().sum(1).cpu())
            weights_N = error_N + 1e-9
        for _ in range(iterations):
            codes_N = self.nearest(z_ND)
            sums = torch.zeros_like(self.entries).index_add_(0, codes_N, z_ND)
            counts = torch.bincount(codes_N, minlength=len(self.entries))[:, None]
            self.entries.copy_(torch.where(counts > 0, sums / counts.clamp(min=1), self.entries))
        counts_E = torch.bincount(self.nearest(z_ND), minlength=len(self.entries)).to(z_ND.dtype)
        self.usage.copy_(counts_E * len(self.entries) / len(z_ND))
        self.sums.copy_(self.entries * self.usage[:, None])

    @torch.no_grad()
    def update(self, z_ND: Tensor, codes_N: Tensor, decay: float) -> None:
        """Move the averages toward this batch's assignments."""
        size = self.entries.shape[0]
        counts = torch.bincount(codes_N, minlength=size).to(z_ND.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, codes_N, z_ND)
        self.usage.mul_(decay).add_(counts * size / len(z_ND), alpha=1 - decay)
        self.sums.mul_(decay).add_(sums * size / len(z_ND), alpha=1 - decay)
        used = self.usage > 1e-4
        self.entries[used] = self.sums[used] / self.usage[used, None]

    @torch.no_grad()
    def restart(self, z_ND: Tensor, below: float, generator: torch.Generator) -> int:
        """Restart entries used less than ``below`` times the mean; returns how many.

        They move to encoder outputs drawn in proportion to their squared quantization error: to what the codebook says worst.
        """
        dead = (self.usage < below * self.usage.mean()).nonzero().flatten()
        if len(dead):
            error = (z_ND - self.lookup(self.nearest(z_ND))).square().sum(1) + 1e-9
            picks = torch.multinomial(error.cpu(), len(dead), replacement=True, generator=generator)
            fresh_usage = 2 * below
            self.entries[dead] = z_ND[picks.to(z_ND.device)]
            self.usage[dead] = fresh_usage
            self.sums[dead] = self.entries[dead] * fresh_usage
        return len(dead)


class ImageTokenizer(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> codes (B, h*w), row by row from the top left."""

    def __init__(self, spec: ImageTokenizerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder, self.decoder = Encoder(spec), Decoder(spec)
        self.codebook = Codebook(spec.codebook_size, spec.embedding_dim)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes (B, h*w), int64.

        Raises:
            ValueError: if the images are not (B, 3, image_size, image_size).
        """
        size = self.spec.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"expected images of shape (B, 3, {size}, {size}), found {tuple(images.shape)}")
        z_NhwD = self.encoder(images).permute(0, 2, 3, 1)
        return self.codebook.nearest(z_NhwD.reshape(-1, self.spec.embedding_dim)).view(len(images), -1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] from codes (B, h*w)."""
        side = self.spec.side
        z_BDhw = self.codebook.lookup(codes).view(-1, side, side, self.spec.embedding_dim).permute(0, 3, 1, 2)
        return self.decoder(z_BDhw.contiguous()).clamp(-1, 1)

    def save(self, directory: Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(asdict(self.spec), indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, directory / "model.safetensors")

    @classmethod
    def load(cls, directory: Path, device: str | torch.device = "cpu") -> ImageTokenizer:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if the directory holds no image tokenizer.
        """
        directory = Path(directory)
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(f"{directory}: no image tokenizer here; run: cm3leon image_tokenizer")
        fields = json.loads((directory / "config.json").read_text())
        model = cls(ImageTokenizerSpec(**{**fields, "multipliers": tuple(fields["multipliers"])}))
        model.load_state_dict(load_file(directory / "model.safetensors"))
        return model.to(device).eval()


@torch.no_grad()
def reconstruct(model: ImageTokenizer, images: Tensor, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Codes (N, h*w) and reconstructions uint8 (N, H, W, 3) of uint8 images (N, H, W, 3)."""
    device = next(model.parameters()).device
    codes, outputs = [], []
    for batch in images.split(batch_size):
        codes.append(model.encode(to_channels_first(batch, device)))
        outputs.append(to_channels_last(model.decode(codes[-1])))
    return torch.cat(codes).cpu(), torch.cat(outputs)
