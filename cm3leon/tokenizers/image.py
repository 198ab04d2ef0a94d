"""The image tokenizer: a VQ-GAN autoencoder, images <-> grids of codes.

The family of Make-A-Scene and taming-transformers (arXiv 2203.13131, 2012.09841): a convolutional encoder, a codebook, a mirrored
decoder. One addition for small budgets: with ``patch`` > 1 the image is pixel-unshuffled first, so that no convolution runs at
full resolution. Shapes: B batch, C channels, H W pixels, h w tokens; downsampling f = patch * 2 ** (levels - 1), h = H / f.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class ImageTokenizerSpec:
    """What it takes to build the network again; stored beside the weights as ``config.json``."""

    image_size: int
    patch: int
    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    embedding_dim: int
    codebook_size: int

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


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, around an identity (or 1x1) shortcut."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(channels_in), nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2, self.conv2 = norm(channels_out), nn.Conv2d(channels_out, channels_out, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        self.shortcut = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


def norm(channels: int) -> nn.GroupNorm:
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g >= 4 or g == 1)
    return nn.GroupNorm(groups, channels)


class Encoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> (B, embedding_dim, h, w)."""

    def __init__(self, spec: ImageTokenizerSpec) -> None:
        super().__init__()
        widths = [spec.channels * m for m in spec.multipliers]
        layers: list[nn.Module] = [nn.PixelUnshuffle(spec.patch), nn.Conv2d(3 * spec.patch**2, widths[0], 3, padding=1)]
        previous = widths[0]
        for level, width in enumerate(widths):
            if level:
                layers.append(nn.Conv2d(previous, previous, 4, stride=2, padding=1))
            for _ in range(spec.blocks):
                layers.append(ResidualBlock(previous, width))
                previous = width
        layers += [norm(previous), nn.SiLU(), nn.Conv2d(previous, spec.embedding_dim, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Decoder(nn.Module):
    """(B, embedding_dim, h, w) -> (B, 3, H, W), about [-1, 1]."""

    def __init__(self, spec: ImageTokenizerSpec) -> None:
        super().__init__()
        widths = [spec.channels * m for m in reversed(spec.multipliers)]
        layers: list[nn.Module] = [nn.Conv2d(spec.embedding_dim, widths[0], 3, padding=1)]
        previous = widths[0]
        for level, width in enumerate(widths):
            for _ in range(spec.blocks):
                layers.append(ResidualBlock(previous, width))
                previous = width
            if level < len(widths) - 1:
                layers += [nn.Conv2d(previous, 4 * previous, 1), nn.PixelShuffle(2)]
        self.layers = nn.Sequential(*layers, norm(previous), nn.SiLU())
        self.output = nn.Conv2d(previous, 3 * spec.patch**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(spec.patch)

    def forward(self, latents: Tensor) -> Tensor:
        return self.shuffle(self.output(self.layers(latents)))


class Codebook(nn.Module):
    """Nearest-neighbour quantisation with L2-normalised entries, learned by exponential moving averages.

    EMA codebook: van den Oord et al. 2017 (arXiv 1711.00937), appendix A. Unit-norm entries: Yu et al. 2021 (arXiv 2110.04627).
    Against collapse, entries that are used too seldom are restarted at encoder outputs (:meth:`restart`).
    """

    entries: Tensor
    usage: Tensor
    sums: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        entries = F.normalize(torch.randn(size, dim), dim=-1)
        self.register_buffer("entries", entries)
        self.register_buffer("usage", torch.ones(size), persistent=False)
        self.register_buffer("sums", entries.clone(), persistent=False)

    def nearest(self, z_ND: Tensor) -> Tensor:
        """Index of the entry nearest to each row."""
        return (F.normalize(z_ND, dim=-1) @ self.entries.T).argmax(-1)

    def lookup(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.entries)

    @torch.no_grad()
    def initialise(self, z_ND: Tensor, generator: torch.Generator, iterations: int = 10) -> None:
        """Spherical k-means of encoder outputs, seeded as k-means++: each entry at an output drawn in proportion to its error so far."""
        z_ND = F.normalize(z_ND, dim=-1)
        error_N = torch.ones(len(z_ND), device=z_ND.device)
        for index in range(len(self.entries)):
            pick = int(torch.multinomial(error_N.cpu(), 1, generator=generator))
            self.entries[index] = z_ND[pick]
            error_N = torch.minimum(error_N, (1 - z_ND @ z_ND[pick]).clamp(min=1e-9))
        for _ in range(iterations):
            codes_N = self.nearest(z_ND)
            sums = torch.zeros_like(self.entries).index_add_(0, codes_N, z_ND)
            counts = torch.bincount(codes_N, minlength=len(self.entries))
            self.entries.copy_(torch.where(counts[:, None] > 0, F.normalize(sums, dim=-1), self.entries))
        counts = torch.bincount(self.nearest(z_ND), minlength=len(self.entries)).to(z_ND.dtype)
        self.usage.copy_(counts * len(self.entries) / len(z_ND))
        self.sums.copy_(self.entries * self.usage[:, None])

    @torch.no_grad()
    def update(self, z_ND: Tensor, codes_N: Tensor, decay: float) -> None:
        """Move the averages toward this batch's assignments."""
        z_ND = F.normalize(z_ND, dim=-1)
        size = self.entries.shape[0]
        counts = torch.bincount(codes_N, minlength=size).to(z_ND.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, codes_N, z_ND)
        self.usage.mul_(decay).add_(counts, alpha=1 - decay)
        self.sums.mul_(decay).add_(sums, alpha=1 - decay)
        self.entries.copy_(F.normalize(self.sums, dim=-1))

    @torch.no_grad()
    def restart(self, z_ND: Tensor, below: float, generator: torch.Generator) -> int:
        """Restart entries used less than ``below`` times the mean; returns how many.

        They move to encoder outputs drawn in proportion to their quantisation error: to what the codebook says worst.
        """
        dead = (self.usage < below * self.usage.mean()).nonzero().flatten()
        if len(dead):
            z_ND = F.normalize(z_ND, dim=-1)
            error = 1 - (z_ND @ self.entries.T).amax(-1).clamp(max=1) + 1e-6
            fresh = z_ND[torch.multinomial(error.cpu(), len(dead), replacement=True, generator=generator).to(z_ND.device)]
            self.entries[dead], self.sums[dead] = fresh, fresh * self.usage.mean()
            self.usage[dead] = self.usage.mean()
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
