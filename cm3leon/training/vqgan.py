"""Training of the image tokenizer (Esser et al. 2021, arXiv 2012.09841, section 3.1).

With encoder E, decoder G, images x, latents z = E(x), z_q the codebook's entries nearest to z, and x_hat = G(z_q), the loss is

    reconstruction = smooth_l1(x, x_hat) + perceptual_weight * perceptual(x, x_hat)
    commitment     = mean((z - sg[z_q])^2)                       (arXiv 1711.00937, equation 3, third term)
    loss = reconstruction + beta * commitment - adversarial_weight * adaptive_weight * mean(D(x_hat))

where sg stops gradients, beta is ``commitment`` of the parameters, and D is a patch discriminator, trained by the hinge loss. The codebook
has no loss: it is updated by moving averages (:class:`cm3leon.models.vqgan.Codebook`). The perceptual and adversarial losses are off by
default.

Shapes: B batch, H W pixels, h w tokens of an image, N = B * h * w latents, D their dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm3leon.config.schema import ImageTokenizerConfig
from cm3leon.data.pixels import Images
from cm3leon.models.vqgan import ImageTokenizer, ImageTokenizerSpec
from cm3leon.training.muon import Muon
from cm3leon.training.optimizer import learning_rate_at, set_learning_rate
from cm3leon.training.vqgan_losses import PatchDiscriminator, PerceptualLoss, adaptive_weight, hinge_loss
from cm3leon.utils.errors import UserError
from cm3leon.utils.images import to_channels_first
from cm3leon.utils.progress import progress

HUBER_BETA = 0.2
"""Errors below this (pixels are in [-1, 1]) are penalized quadratically, larger ones linearly: L1 has noisy gradients for small errors."""
RESTART_EVERY = 20
"""Steps between restarts of unused codebook entries."""
RECENT_BATCHES = 32
"""Batches whose latents the codebook is initialized from."""
LOG_EVERY = 20
WEIGHT_DECAY = 1e-4
FINAL_LEARNING_RATE = 0.05
"""Share of the peak learning rate at the last step."""


def make_optimizers(model: nn.Module, config: ImageTokenizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the convolutions and AdamW for their biases and the norms' scales."""
    filters = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)] if config.optimizer == "muon" else []
    known = {id(p) for p in filters}
    others = [p for p in model.parameters() if id(p) not in known]
    adamw = torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    if not filters:
        return [adamw]
    dtype = torch.bfloat16 if filters[0].is_cuda else torch.float32
    return [adamw, Muon(filters, config.learning_rate, WEIGHT_DECAY, dtype=dtype)]


def code_statistics(codes: Tensor, size: int) -> dict[str, float]:
    """Share of the codebook's entries in use, and perplexity of their use: ``exp(-sum p log p)``, at most ``size``."""
    p = torch.bincount(codes.flatten(), minlength=size).double()
    p = p / p.sum()
    entropy = -(p[p > 0] * p[p > 0].log()).sum()
    return {"codebook_usage": float((p > 0).double().mean()), "codebook_perplexity": float(entropy.exp())}


def psnr(images: Tensor, reconstructions: Tensor) -> float:
    """Peak signal-to-noise ratio of uint8 images, dB: ``10 log10(255**2 / mean squared error)`` over all images together."""
    error = (images.float() - reconstructions.float()).square().mean().item()
    return 10 * math.log10(255**2 / max(error, 1e-10))


def make_spec(config: ImageTokenizerConfig) -> ImageTokenizerSpec:
    """The architecture that the parameters describe."""
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
    """One training run: networks, optimizers, and the losses of a step."""

    def __init__(self, config: ImageTokenizerConfig, seed: int, device: torch.device) -> None:
        torch.manual_seed(seed)
        self.config, self.device = config, device
        self.model = ImageTokenizer(make_spec(config)).to(device)
        self.optimizers = make_optimizers(self.model, config)
        self.generator = torch.Generator().manual_seed(seed)
        self.recent: list[Tensor] = []  # latents (N, D) of the last batches before the codebook is initialized
        self.perceptual = PerceptualLoss(Path(str(config.perceptual_weights))).to(device) if config.perceptual_weight else None
        self.discriminator = PatchDiscriminator().to(device) if config.adversarial_weight else None
        if self.discriminator is not None:
            self.discriminator_optimizer = torch.optim.AdamW(self.discriminator.parameters(), lr=config.learning_rate, betas=(0.5, 0.9))

    def quantize(self, z_BDhw: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize latents with a straight-through gradient, and update the codebook.

        Returns:
            Quantized latents (B, D, h, w), commitment loss, and codes (N,).
        """
        codebook, config = self.model.codebook, self.config
        z_BhwD = z_BDhw.permute(0, 2, 3, 1)
        z_ND = z_BhwD.reshape(-1, config.embedding_dim)
        detached_ND = z_ND.detach()
        # 1. For the first share of the steps there is no quantization: the autoencoder learns before it needs a codebook.
        first_quantized = round(config.continuous_share * config.steps)
        if step < first_quantized:
            self.recent = [*self.recent[1 - RECENT_BATCHES :], detached_ND]
            return z_BDhw, z_ND.new_zeros(()), codebook.nearest(detached_ND)
        # 2. Then the codebook is initialized from the latents of the last batches.
        if step == first_quantized:
            codebook.initialize(torch.cat([*self.recent, detached_ND]), self.generator)
            self.recent = []
        # 3. The codebook follows the latents by moving averages, with restarts until a share of the steps.
        codes_N = codebook.nearest(detached_ND)
        codebook.update(detached_ND, codes_N, config.codebook_decay)
        if step % RESTART_EVERY == RESTART_EVERY - 1 and step < config.restart_until * config.steps:
            codebook.restart(detached_ND, config.restart_below, self.generator)
        # 4. Straight-through estimator: the value is z_q, the gradient passes to z unchanged.
        quantized_ND = codebook.lookup(codes_N)
        commitment = F.mse_loss(z_ND, quantized_ND.detach())
        straight_through_ND = z_ND + (quantized_ND - z_ND).detach()
        return straight_through_ND.view_as(z_BhwD).permute(0, 3, 1, 2).contiguous(), commitment, codes_N

    def step(self, images_B3HW: Tensor, step: int) -> dict[str, float]:
        """One optimization step on images in [-1, 1]; returns the losses and the codebook's statistics.

        Raises:
            UserError: if the loss is not finite.
        """
        config = self.config
        # 1. Reconstruction and commitment losses.
        latents, commitment, codes = self.quantize(self.model.encoder(images_B3HW), step)
        output_B3HW = self.model.decoder(latents)
        reconstruction = F.smooth_l1_loss(output_B3HW, images_B3HW, beta=HUBER_BETA)
        if self.perceptual is not None:
            reconstruction = reconstruction + config.perceptual_weight * self.perceptual(images_B3HW, output_B3HW)
        loss = reconstruction + config.commitment * commitment
        metrics = {
            "l1": (output_B3HW - images_B3HW).abs().mean().item(),
            "commitment": commitment.item(),
            **code_statistics(codes.cpu(), config.codebook_size),
        }
        # 2. Adversarial loss, once the reconstructions are worth discriminating.
        adversarial = self.discriminator is not None and step >= config.adversarial_start
        if adversarial and self.discriminator is not None:
            generator_loss = -self.discriminator(output_B3HW).mean()
            weight = adaptive_weight(reconstruction, generator_loss, self.model.decoder.output.weight) * config.adversarial_weight
            loss = loss + weight * generator_loss
            metrics["generator_loss"] = generator_loss.item()
        # 3. Update encoder and decoder.
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = learning_rate_at(
            step, peak=config.learning_rate, steps=config.steps, warmup_steps=config.warmup_steps, final=FINAL_LEARNING_RATE
        )
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, rate)
            optimizer.step()
        # 4. Update the discriminator, on the reconstructions from before the update.
        if adversarial:
            metrics["discriminator_loss"] = self.discriminator_step(images_B3HW, output_B3HW.detach())
        if not math.isfinite(loss.item()):
            raise UserError(f"image tokenizer diverged at step {step}: loss {loss.item()}; lower image_tokenizer.learning_rate")
        return {"loss": loss.item(), **metrics}

    def discriminator_step(self, images_B3HW: Tensor, output_B3HW: Tensor) -> float:
        """One optimization step of the discriminator; returns its hinge loss."""
        assert self.discriminator is not None
        loss = hinge_loss(self.discriminator, images_B3HW, output_B3HW)
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.discriminator_optimizer.step()
        return loss.item()


def train_image_tokenizer(
    images: Images,
    config: ImageTokenizerConfig,
    seed: int,
    device: torch.device,
    log: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
) -> ImageTokenizer:
    """Train on uint8 images (n, image_size, image_size, 3); ``log`` receives metrics and the step every :data:`LOG_EVERY` steps.

    Raises:
        UserError: if the loss is not finite.
    """
    trainer = ImageTokenizerTrainer(config, seed, device)
    trainer.model.train()
    order = torch.randperm(len(images), generator=trainer.generator)
    position = 0
    with progress("image tokenizer", config.steps, "steps") as meter:
        for step in range(config.steps):
            if position + config.batch_size > len(order):  # the end of an epoch that does not fill a batch is dropped
                order = torch.randperm(len(images), generator=trainer.generator)
                position = 0
            batch_BHW3 = torch.from_numpy(images[order[position : position + config.batch_size].numpy()])
            position += config.batch_size
            metrics = trainer.step(to_channels_first(batch_BHW3, device), step)
            if step % LOG_EVERY == 0 or step == config.steps - 1:
                log(metrics, step)
            meter.advance(1, f"L1 {metrics['l1']:.4f}, codes used {metrics['codebook_usage']:.0%}")
    return trainer.model.eval()
