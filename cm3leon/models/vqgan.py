"""The image tokenizer: a VQ-GAN autoencoder, images <-> grids of codes.

The architecture of taming-transformers and Make-A-Scene (arXiv 2012.09841, 2203.13131): a convolutional encoder, a codebook, a mirrored
decoder. Two changes make it learn in minutes (docs/log.md):

- With ``patch`` > 1 the image is pixel-unshuffled first, so that no convolution runs at full resolution.
- There is no normalization outside the residual branches, and these are zero at initialization. The network is a linear map of patches at
  first, which reconstructs flat colors from the start.

Shapes: B batch, C channels, H W pixels, h w tokens of an image, h = H / f with downsampling f = patch * 2 ** (levels - 1); N = B * h * w
latents, D their dimensions, E entries of the codebook.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cm3leon.models.pixels import to_channels_first, to_channels_last
from cm3leon.utils.files import read_file, read_json

MADE_BY = "cm3leon image_tokenizer"


@dataclass(frozen=True)
class ImageTokenizerSpec:
    """Architecture of an image tokenizer; stored next to the weights as ``config.json``."""

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
    """RMSNorm (arXiv 1910.07467) over the channels of each position: ``x / sqrt(mean(x**2)) * scale``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW * torch.rsqrt(x_BCHW.square().mean(1, keepdim=True) + 1e-6) * self.scale


class ResidualBlock(nn.Module):
    """``x + out(SiLU(conv(norm(x))))``; the identity at initialization, as the 1x1 convolution ``out`` is zero.

    Args:
        kernel: side of the other convolution's kernel.
    """

    def __init__(self, channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.out(F.silu(self.conv(self.norm(x_BCHW))))


def init_linear(network: nn.Module) -> None:
    """Initialize 1x1 convolutions as orthogonal and residual branches as zero: the network is then an orthogonal map of patches."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None
            nn.init.zeros_(module.bias)
            if module.kernel_size == (1, 1):
                nn.init.orthogonal_(module.weight.view(module.out_channels, -1))
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.out.weight)


class Encoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to latents (B, D, h, w).

    With ``encoder_kernel`` 1 a latent depends on its own patch only, so that equal patches have equal codes whatever surrounds them.
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
        init_linear(self)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.layers(images_B3HW)


class Decoder(nn.Module):
    """Latents (B, D, h, w) to images (B, 3, H, W), about in [-1, 1]."""

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
        init_linear(self)

    def forward(self, z_BDhw: Tensor) -> Tensor:
        return self.shuffle(self.output(self.layers(z_BDhw)))


MAX_DISTANCES = 1 << 26
"""Distances of latents and entries that are in memory at once, 256 MB."""
LATENTS_PER_ENTRY = 64
"""Most latents for each entry that the codebook is initialized from."""


class Codebook(nn.Module):
    """Nearest-neighbor quantization with entries learned by exponential moving averages (arXiv 1711.00937, appendix A).

    For entry i, with n_i latents z assigned to it in a batch and decay g:

        usage_i <- g usage_i + (1 - g) n_i
        sums_i  <- g sums_i  + (1 - g) sum of those z
        entry_i  = sums_i / usage_i

    Here n_i and the sums are scaled by E / N, so that an entry of average use has usage 1 whatever the size of the batch.

    Entries are initialized by k-means of latents (:meth:`initialize`). Against codebook collapse, entries that are hardly used are
    restarted at latents that the codebook quantizes badly (:meth:`restart`).

    Attributes:
        entries: (E, D).
        used: (E,), boolean: those that :meth:`nearest` may find; all of them until training has ended.
        usage: (E,), moving average of each entry's use.
        sums: (E, D), moving average of the sum of each entry's latents.
    """

    entries: Tensor
    used: Tensor
    usage: Tensor
    sums: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        entries_ED = torch.randn(size, dim)
        self.register_buffer("entries", entries_ED)
        self.register_buffer("used", torch.ones(size, dtype=torch.bool))
        self.register_buffer("usage", torch.ones(size), persistent=False)
        self.register_buffer("sums", entries_ED.clone(), persistent=False)

    def nearest(self, z_ND: Tensor) -> Tensor:
        """Codes (N,): index of the used entry nearest to each latent."""
        # argmin |z - e|^2 = argmax (z e - |e|^2 / 2), as |z|^2 is the same for all entries.
        halves_E = (0.5 * self.entries.square().sum(1)).masked_fill(~self.used, torch.inf)
        rows = max(1, MAX_DISTANCES // len(self.entries))
        codes = [(part @ self.entries.T - halves_E).argmax(-1) for part in z_ND.split(rows)]
        return codes[0] if len(codes) == 1 else torch.cat(codes)

    def lookup(self, codes: Tensor) -> Tensor:
        """Entries (..., D) of codes (...)."""
        return F.embedding(codes, self.entries)

    @torch.no_grad()
    def initialize(self, z_ND: Tensor, generator: torch.Generator, iterations: int = 10) -> None:
        """Set the entries to the centroids of latents: k-means, seeded by k-means++ (Arthur and Vassilvitskii 2007).

        Of more than :data:`LATENTS_PER_ENTRY` latents an entry, a random sample is used.
        """
        if len(z_ND) > (most := LATENTS_PER_ENTRY * len(self.entries)):
            z_ND = z_ND[torch.randperm(len(z_ND), generator=generator)[:most].to(z_ND.device)]
        # 1. k-means++: each entry is a latent, sampled in proportion to its squared distance to the nearest entry so far.
        error_N = torch.full((len(z_ND),), torch.inf)
        weights_N = torch.ones(len(z_ND))
        for index in range(len(self.entries)):
            pick = int(torch.multinomial(weights_N, 1, generator=generator))
            self.entries[index] = z_ND[pick]
            error_N = torch.minimum(error_N, (z_ND - z_ND[pick]).square().sum(1).cpu())
            weights_N = error_N + 1e-9
        # 2. k-means: each entry moves to the mean of its latents; entries without any stay.
        for _ in range(iterations):
            codes_N = self.nearest(z_ND)
            sums_ED = torch.zeros_like(self.entries).index_add_(0, codes_N, z_ND)
            counts_E1 = torch.bincount(codes_N, minlength=len(self.entries))[:, None]
            self.entries.copy_(torch.where(counts_E1 > 0, sums_ED / counts_E1.clamp(min=1), self.entries))
        # 3. Moving averages that agree with the entries.
        counts_E = torch.bincount(self.nearest(z_ND), minlength=len(self.entries)).to(z_ND.dtype)
        self.usage.copy_(counts_E * len(self.entries) / len(z_ND))
        self.sums.copy_(self.entries * self.usage[:, None])

    def statistics(self, z_ND: Tensor, codes_N: Tensor) -> tuple[Tensor, Tensor]:
        """Of latents with these codes, how many each entry has, (E,), and their sum, (E, D): what :meth:`update` needs of a batch."""
        counts_E = torch.zeros_like(self.usage).index_add_(0, codes_N, torch.ones_like(z_ND[:, 0]))
        return counts_E, torch.zeros_like(self.sums).index_add_(0, codes_N, z_ND)

    @torch.no_grad()
    def update(self, counts_E: Tensor, sums_ED: Tensor, decay: float) -> None:
        """Update the moving averages and the entries by the :meth:`statistics` of a batch."""
        size, latents = len(self.entries), counts_E.sum()
        self.usage.mul_(decay).add_(counts_E * size / latents, alpha=1 - decay)
        self.sums.mul_(decay).add_(sums_ED * size / latents, alpha=1 - decay)
        used_E1 = self.usage[:, None] > 1e-4  # entries without use keep their value: both averages go to zero
        self.entries.copy_(torch.where(used_E1, self.sums / self.usage[:, None], self.entries))

    @torch.no_grad()
    def restart(self, z_ND: Tensor, below: float, generator: torch.Generator) -> int:
        """Restart entries with a usage of less than ``below`` times the mean; returns their number.

        They are set to latents sampled in proportion to their squared quantization error.
        """
        dead = (self.usage < below * self.usage.mean()).nonzero().flatten()
        if len(dead):
            error_N = (z_ND - self.lookup(self.nearest(z_ND))).square().sum(1) + 1e-9
            picks = torch.multinomial(error_N.cpu(), len(dead), replacement=True, generator=generator)
            initial_usage = 2 * below  # above the threshold, so that the entry is not restarted again before it can be used
            self.entries[dead] = z_ND[picks.to(z_ND.device)]
            self.usage[dead] = initial_usage
            self.sums[dead] = self.entries[dead] * initial_usage
        return len(dead)


class ImageTokenizer(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> codes (B, h * w) in raster order."""

    def __init__(self, spec: ImageTokenizerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder, self.decoder = Encoder(spec), Decoder(spec)
        self.codebook = Codebook(spec.codebook_size, spec.embedding_dim)

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes (B, h * w), int64.

        Args:
            dtype: of the encoder's matrix products. Nearest entries are searched in float32, also under autocast: in bfloat16 many entries
                are equally near.

        Raises:
            ValueError: if the images are not (B, 3, image_size, image_size).
        """
        size = self.spec.image_size
        if images_B3HW.ndim != 4 or images_B3HW.shape[1:] != (3, size, size):
            raise ValueError(f"expected images of shape (B, 3, {size}, {size}), found {tuple(images_B3HW.shape)}")
        device = images_B3HW.device.type
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            z_BhwD = self.encoder(images_B3HW).permute(0, 2, 3, 1)
        with torch.autocast(device, enabled=False):
            return self.codebook.nearest(z_BhwD.float().reshape(-1, self.spec.embedding_dim)).view(len(images_B3HW), -1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of codes (B, h * w)."""
        side = self.spec.side
        z_BDhw = self.codebook.lookup(codes).view(-1, side, side, self.spec.embedding_dim).permute(0, 3, 1, 2)
        return self.decoder(z_BDhw.contiguous()).clamp(-1, 1)

    def save(self, directory: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(asdict(self.spec), indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, directory / "model.safetensors")

    @classmethod
    def load(cls, directory: Path, device: str | torch.device = "cpu") -> ImageTokenizer:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if the directory holds no image tokenizer.
            DamagedFileError: if a file of it is truncated.
        """
        directory = Path(directory)
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(f"{directory}: no image tokenizer here; run: {MADE_BY}")
        fields = read_file(directory / "config.json", read_json, MADE_BY)
        model = cls(ImageTokenizerSpec(**{**fields, "multipliers": tuple(fields["multipliers"])}))
        tensors = read_file(directory / "model.safetensors", load_file, MADE_BY)
        model.load_state_dict({"codebook.used": model.codebook.used} | tensors)  # earlier versions wrote none: all are used
        return model.to(device).eval()


@torch.no_grad()
def reconstruct(model: ImageTokenizer, images: Tensor, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Codes (B, h * w) and reconstructions, uint8 (B, H, W, 3), of uint8 images (B, H, W, 3), ``batch_size`` at a time."""
    device = next(model.parameters()).device
    codes, outputs = [], []
    for batch_BHW3 in images.split(batch_size):
        codes.append(model.encode(to_channels_first(batch_BHW3, device)))
        outputs.append(to_channels_last(model.decode(codes[-1])))
    return torch.cat(codes).cpu(), torch.cat(outputs)
