"""Training of the image tokenizer: reconstruction, commitment and, by profile, perceptual and adversarial losses.

Losses as in taming-transformers (arXiv 2012.09841): L1 + perceptual + hinge patch-GAN with the adaptive weight + commitment; the codebook
itself moves by exponential averages (see :class:`cm3leon.models.vqgan.Codebook`). L1 is smoothed near zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm3leon.config.schema import ImageTokenizerConfig
from cm3leon.models.vqgan import ImageTokenizer, ImageTokenizerSpec
from cm3leon.training.muon import Muon
from cm3leon.training.optimizer import learning_rate_at, set_learning_rate
from cm3leon.utils.errors import UserError
from cm3leon.utils.images import to_channels_first
from cm3leon.utils.progress import progress


class Images(Protocol):
    """uint8 images (N, H, W, 3) by an array of positions: a numpy array, or an :class:`cm3leon.data.pixels.ImageSet`."""

    def __len__(self) -> int: ...
    def __getitem__(self, positions: np.ndarray, /) -> np.ndarray: ...


HUBER = 0.2
"""Errors below this (images span 2) count quadratically, larger ones linearly: L1 without its noise on what is nearly right."""
RESTART_EVERY = 20
RECENT_BATCHES = 32
"""Batches whose latents seed the codebook when quantization begins."""
LOG_EVERY = 20
WEIGHT_DECAY = 1e-4
FINAL_LEARNING_RATE = 0.05
"""Share of the peak learning rate at the last step."""


class PatchDiscriminator(nn.Module):
    """Three-layer PatchGAN: (B, 3, H, W) -> a map of real/fake logits."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        previous = 3
        for width in (channels, 2 * channels, 4 * channels):
            layers += [nn.Conv2d(previous, width, 4, stride=2, padding=1), nn.GroupNorm(4, width), nn.LeakyReLU(0.2)]
            previous = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(previous, 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class PerceptualLoss(nn.Module):
    """Mean squared difference of channel-normalized VGG-16 features at five depths: LPIPS (arXiv 1801.03924) without learned weights."""

    DEPTHS = (3, 8, 15, 22, 29)

    def __init__(self, weights: Path) -> None:
        super().__init__()
        from cm3leon.utils.torchvision_compat import make_importable

        make_importable()
        from torchvision.models import vgg16

        if weights.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(weights)
        else:
            state = torch.load(weights, weights_only=True, map_location="cpu")
        network = vgg16(weights=None).features
        network.load_state_dict({k.removeprefix("features."): v for k, v in state.items() if not k.startswith("classifier")})
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def features(self, images: Tensor) -> list[Tensor]:
        x = (images * 0.5 + 0.5 - self.get_buffer("mean")) / self.get_buffer("std")
        kept = []
        for depth, layer in enumerate(self.network):
            x = layer(x)
            if depth in self.DEPTHS:
                kept.append(F.normalize(x, dim=1))
        return kept

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        pairs = zip(self.features(images), self.features(reconstructions), strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).sum()


def make_optimizers(model: nn.Module, config: ImageTokenizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or over biases and scales alone beside Muon over the convolutions."""
    filters = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)] if config.optimizer == "muon" else []
    known = {id(p) for p in filters}
    others = [p for p in model.parameters() if id(p) not in known]
    adamw = torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    if not filters:
        return [adamw]
    dtype = torch.bfloat16 if filters[0].is_cuda else torch.float32
    return [adamw, Muon(filters, config.learning_rate, WEIGHT_DECAY, dtype=dtype)]


def code_statistics(codes: Tensor, size: int) -> dict[str, float]:
    """Share of the codebook in use and the perplexity of its use."""
    p = torch.bincount(codes.flatten(), minlength=size).double()
    p = p / p.sum()
    entropy = -(p[p > 0] * p[p > 0].log()).sum()
    return {"codebook_usage": float((p > 0).double().mean()), "codebook_perplexity": float(entropy.exp())}


def psnr(images: Tensor, reconstructions: Tensor) -> float:
    """Peak signal-to-noise ratio over all uint8 images together, dB."""
    error = (images.float() - reconstructions.float()).square().mean().item()
    return 10 * math.log10(255**2 / max(error, 1e-10))


def spec_of(config: ImageTokenizerConfig) -> ImageTokenizerSpec:
    return ImageTokenizerSpec(
        image_size=config.image_size,
        patch=config.patch,
        channels=config.channels,
        multipliers=tuple(config.multipliers),
        blocks=config.blocks,
        decoder_blocks=config.decoder_blocks,
        embedding_dim=config.embedding_dim,
        codebook_size=config.codebook_size,
        encoder_kernel=config.encoder_kernel,
    )


class ImageTokenizerTrainer:
    """One training run: networks, optimizers and the losses of a step."""

    def __init__(self, config: ImageTokenizerConfig, seed: int, device: torch.device) -> None:
        torch.manual_seed(seed)
        self.config, self.device = config, device
        self.model = ImageTokenizer(spec_of(config)).to(device)
        self.optimizers = make_optimizers(self.model, config)
        self.generator = torch.Generator().manual_seed(seed)
        self.recent: list[Tensor] = []
        self.perceptual = PerceptualLoss(Path(str(config.perceptual_weights))).to(device) if config.perceptual_weight else None
        self.discriminator = PatchDiscriminator().to(device) if config.adversarial_weight else None
        if self.discriminator is not None:
            self.discriminator_optimizer = torch.optim.AdamW(self.discriminator.parameters(), lr=config.learning_rate, betas=(0.5, 0.9))

    def quantize(self, z_BDhw: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Straight-through quantization: quantized latents, commitment loss, codes; moves the codebook.

        For a first share of the training the latents stay continuous; then the codebook is made from them by k-means.
        """
        codebook, config = self.model.codebook, self.config
        z_BhwD = z_BDhw.permute(0, 2, 3, 1)
        z_ND = z_BhwD.reshape(-1, config.embedding_dim)
        fixed_ND = z_ND.detach()
        start = round(config.continuous_share * config.steps)
        if step < start:
            self.recent = [*self.recent[1 - RECENT_BATCHES :], fixed_ND]
            return z_BDhw, z_ND.new_zeros(()), codebook.nearest(fixed_ND)
        if step == start:
            codebook.initialize(torch.cat([*self.recent, fixed_ND]), self.generator)
            self.recent = []
        codes = codebook.nearest(fixed_ND)
        codebook.update(fixed_ND, codes, config.codebook_decay)
        if step % RESTART_EVERY == RESTART_EVERY - 1 and step < config.restart_until * config.steps:
            codebook.restart(fixed_ND, config.restart_below, self.generator)
        quantized = codebook.lookup(codes)
        commitment = F.mse_loss(z_ND, quantized.detach())
        straight = z_ND + (quantized - z_ND).detach()
        return straight.view_as(z_BhwD).permute(0, 3, 1, 2).contiguous(), commitment, codes

    def adversarial_weight(self, reconstruction_loss: Tensor, generator_loss: Tensor) -> Tensor:
        """The adaptive weight: ratio of the two losses' gradients at the last layer."""
        last = self.model.decoder.output.weight
        wanted = torch.autograd.grad(reconstruction_loss, last, retain_graph=True)[0].norm()
        found = torch.autograd.grad(generator_loss, last, retain_graph=True)[0].norm()
        return (wanted / (found + 1e-4)).clamp(0, 1e4).detach() * self.config.adversarial_weight

    def step(self, images: Tensor, step: int) -> dict[str, float]:
        """One optimization step on float images (B, 3, H, W)."""
        config = self.config
        latents, commitment, codes = self.quantize(self.model.encoder(images), step)
        output = self.model.decoder(latents)
        difference = output - images
        reconstruction = F.smooth_l1_loss(output, images, beta=HUBER)
        if self.perceptual is not None:
            reconstruction = reconstruction + config.perceptual_weight * self.perceptual(images, output)
        loss = reconstruction + config.commitment * commitment
        figures = {
            "l1": difference.abs().mean().item(),
            "commitment": commitment.item(),
            **code_statistics(codes.cpu(), config.codebook_size),
        }
        adversarial = self.discriminator is not None and step >= config.adversarial_start
        if adversarial and self.discriminator is not None:
            generator_loss = -self.discriminator(output).mean()
            loss = loss + self.adversarial_weight(reconstruction, generator_loss) * generator_loss
            figures["generator_loss"] = generator_loss.item()
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = learning_rate_at(
            step, peak=config.learning_rate, steps=config.steps, warmup_steps=config.warmup_steps, final=FINAL_LEARNING_RATE
        )
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, rate)
            optimizer.step()
        if adversarial:
            figures["discriminator_loss"] = self.discriminator_step(images, output.detach())
        if not math.isfinite(loss.item()):
            raise UserError(f"image tokenizer diverged at step {step}: loss {loss.item()}; lower image_tokenizer.learning_rate")
        return {"loss": loss.item(), **figures}

    def discriminator_step(self, images: Tensor, output: Tensor) -> float:
        """Hinge loss of the discriminator."""
        assert self.discriminator is not None
        loss = 0.5 * (F.relu(1 - self.discriminator(images)).mean() + F.relu(1 + self.discriminator(output)).mean())
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.discriminator_optimizer.step()
        return loss.item()


def train_image_tokenizer(
    images: Images,
    config: ImageTokenizerConfig,
    seed: int,
    device: torch.device,
    log: Callable[[dict[str, float], int], None] = lambda figures, step: None,
) -> ImageTokenizer:
    """Train on uint8 images (N, image_size, image_size, 3); ``log`` receives figures by step.

    Raises:
        UserError: if the loss is no longer finite.
    """
    trainer = ImageTokenizerTrainer(config, seed, device)
    trainer.model.train()
    order = torch.randperm(len(images), generator=trainer.generator)
    position = 0
    with progress("image tokenizer", config.steps, "steps") as meter:
        for step in range(config.steps):
            if position + config.batch_size > len(order):
                order, position = torch.randperm(len(images), generator=trainer.generator), 0
            batch = torch.from_numpy(images[order[position : position + config.batch_size].numpy()])
            position += config.batch_size
            figures = trainer.step(to_channels_first(batch, device), step)
            if step % LOG_EVERY == 0 or step == config.steps - 1:
                log(figures, step)
            meter.advance(1, f"L1 {figures['l1']:.4f}, codes used {figures['codebook_usage']:.0%}")
    return trainer.model.eval()
