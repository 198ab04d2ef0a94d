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
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm3leon.config.schema import ImageTokenizerConfig
from cm3leon.data.pixels import Images, batches_of
from cm3leon.models.pixels import to_channels_first
from cm3leon.models.vqgan import LATENTS_PER_ENTRY, ImageTokenizer, ImageTokenizerSpec
from cm3leon.training.checkpoint import Checkpoints
from cm3leon.training.distributed import sum_gradients
from cm3leon.training.dry_run import DryWorld, StepMemory, measure, micro_batch, on_a_gpu
from cm3leon.training.loop import Log, Metrics, train
from cm3leon.training.muon import Muon
from cm3leon.training.optimizer import allocate_states, learning_rate_at, set_learning_rate, state_tensors
from cm3leon.training.precision import autocast
from cm3leon.training.shuffling import shuffled_batches
from cm3leon.training.vqgan_losses import PatchDiscriminator, PerceptualLoss, adaptive_weight, hinge_loss, last_layer_gradients
from cm3leon.utils.device import copied_to
from cm3leon.utils.world import ALONE, World

HUBER_BETA = 0.2
"""Errors below this (pixels are in [-1, 1]) are penalized quadratically, larger ones linearly: L1 has noisy gradients for small errors."""
RESTART_EVERY = 5
"""Steps between restarts of unused codebook entries: few, as they restart at latents of one batch, and a rare patch is in few batches."""
RECENT_BATCHES = 32
"""Batches whose latents the codebook is initialized from."""
COUNTED_IMAGES = 32_768
"""Most training images by whose codes :func:`mark_used` tells which entries are used."""
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
    return {name: float(value) for name, value in use_statistics(torch.bincount(codes.flatten(), minlength=size)).items()}


def use_statistics(counts_E: Tensor) -> dict[str, Tensor]:
    """:func:`code_statistics` of each entry's number of uses."""
    p = counts_E.double() / counts_E.sum()
    return {"codebook_usage": (p > 0).double().mean(), "codebook_perplexity": torch.special.entr(p).sum().exp()}


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


@dataclass(frozen=True)
class Losses:
    """Of a micro-batch, means over its images. ``generator``, the generator's adversarial loss, is zero before the adversarial training."""

    images_B3HW: Tensor
    output_B3HW: Tensor
    reconstruction: Tensor
    commitment: Tensor
    generator: Tensor

    @property
    def competing(self) -> tuple[Tensor, Tensor]:
        """The two that the adaptive weight balances."""
        return self.reconstruction, self.generator

    @property
    def l1(self) -> Tensor:
        """Mean absolute error."""
        return (self.output_B3HW - self.images_B3HW).abs().mean()


class ImageTokenizerTrainer:
    """One training run: networks, optimizers, and the losses of a step.

    The images of a step are divided among the processes, and those of a process into micro-batches. Gradients are sums over all of them,
    and the codebook follows all their latents, so that the result is that of the whole batch but for rounding.
    """

    def __init__(self, config: ImageTokenizerConfig, images: Images, seed: int, world: World = ALONE) -> None:
        torch.manual_seed(seed)
        self.images, self.config, self.seed, self.world = images, config, seed, world
        self.batch_size = min(config.batch_size, len(images))
        self.model = ImageTokenizer(make_spec(config)).to(world.device).train()
        self.optimizers = make_optimizers(self.model, config)
        self.generator = torch.Generator().manual_seed(seed)
        self.recent: list[Tensor] = []  # latents (N, D) of the last batches before the codebook is initialized
        weights = config.perceptual_weights
        self.perceptual = PerceptualLoss(Path(weights) if weights else None).to(world.device) if config.perceptual_weight else None
        self.discriminator = PatchDiscriminator().to(world.device) if config.adversarial_weight else None
        self.discriminator_optimizers: list[torch.optim.Optimizer] = []
        if self.discriminator is not None:
            parameters = self.discriminator.parameters()
            self.discriminator_optimizers = [torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.5, 0.9))]
        allocate_states([*self.optimizers, *self.discriminator_optimizers])

    @property
    def first_quantized(self) -> int:
        """The first step that quantizes. Before it the autoencoder learns without: it needs to before it can use a codebook."""
        return round(self.config.continuous_share * self.config.steps)

    def batches(self, first: int) -> Generator[np.ndarray, None, None]:
        """This process's images of each step, uint8 (B, H, W, 3); see :class:`~cm3leon.training.loop.Trainer`."""
        own = self.world.share(self.batch_size)
        yield from batches_of(self.images, (drawn[own] for drawn in shuffled_batches(len(self.images), self.batch_size, self.seed, first)))

    def step(self, number: int, batch: np.ndarray) -> Metrics:
        """One optimization step; see :class:`~cm3leon.training.loop.Trainer`."""
        for network in self.networks:
            network.zero_grad(set_to_none=True)
        metrics = self.backward(copied_to(torch.from_numpy(batch), self.world.device), number)
        return {**metrics, "gradient_norm": self.update(number)}

    @property
    def networks(self) -> list[nn.Module]:
        return [self.model, self.discriminator] if self.discriminator is not None else [self.model]

    def backward(self, pixels_BHW3: Tensor, step: int) -> Metrics:
        """Add the gradients of all losses of this process's images, uint8; update the codebook."""
        config, world = self.config, self.world
        parts = pixels_BHW3.split(config.micro_batch_size or len(pixels_BHW3))
        shares = [len(part) / self.batch_size for part in parts]
        adversarial = self.discriminator is not None and step >= config.adversarial_start
        # 1. The latents of the whole batch, which the codebook follows. Those of a single micro-batch keep their graph; of several, each is
        #    encoded again when its gradients are computed.
        alone = len(parts) == 1
        with torch.set_grad_enabled(alone):
            latents = [self.encode(part) for part in parts]
        codes, metrics = self.update_codebook(torch.cat([as_rows(z).detach() for z in latents]), step)

        def losses_of(index: int, z_BDhw: Tensor) -> Losses:
            chosen = None if codes is None else codes.view(len(pixels_BHW3), -1).split([len(part) for part in parts])[index]
            return self.losses(parts[index], z_BDhw, chosen, adversarial)

        only = losses_of(0, latents[0]) if alone else None
        # 2. The weight of the adversarial loss balances gradients of the whole batch.
        weight = torch.zeros((), device=world.device)
        if adversarial:
            last_layer = self.model.decoder.output.weight
            gradients = torch.zeros(2, *last_layer.shape, device=world.device)
            for index, share in enumerate(shares):
                gradients += share * last_layer_gradients(*(only or losses_of(index, latents[index])).competing, last_layer)
            weight = adaptive_weight(*world.add(gradients)) * config.adversarial_weight
        # 3. The gradients of each micro-batch.
        total = torch.zeros(5, device=world.device)
        for index, share in enumerate(shares):
            found = only or losses_of(index, self.encode(parts[index]))
            loss = found.reconstruction + config.commitment * found.commitment + weight * found.generator
            (loss * share).backward(inputs=list(self.model.parameters()))
            discriminator = self.discriminator_backward(found, share) if adversarial else found.generator
            total += share * torch.stack([loss, found.l1, found.commitment, found.generator, discriminator]).detach()
            del found, loss, discriminator  # and their graph, before the next one is made
        names = ["loss", "l1", "commitment", *(["generator_loss", "discriminator_loss"] if adversarial else [])]
        return dict(zip(names, world.add(total), strict=False)) | metrics

    def encode(self, pixels_BHW3: Tensor) -> Tensor:
        """Latents (B, D, h, w), float32, of uint8 images."""
        with autocast(self.config, self.world.device):
            return self.model.encoder(to_channels_first(pixels_BHW3, self.world.device)).float()

    def losses(self, pixels_BHW3: Tensor, z_BDhw: Tensor, codes: Tensor | None, adversarial: bool) -> Losses:
        """Losses of uint8 images by their latents and, once these are quantized, their codes (B, h * w)."""
        config, zero = self.config, z_BDhw.new_zeros(())
        images_B3HW = to_channels_first(pixels_BHW3, self.world.device)
        quantized, commitment = (z_BDhw, zero) if codes is None else self.quantize(z_BDhw, codes)
        with autocast(config, self.world.device):
            output_B3HW = self.model.decoder(quantized).float()
            reconstruction = F.smooth_l1_loss(output_B3HW, images_B3HW, beta=HUBER_BETA)
            if self.perceptual is not None:
                reconstruction = reconstruction + config.perceptual_weight * self.perceptual(images_B3HW, output_B3HW).float()
            generator = -self.discriminator(output_B3HW).float().mean() if self.discriminator is not None and adversarial else zero
        return Losses(images_B3HW, output_B3HW, reconstruction, commitment, generator)

    def quantize(self, z_BDhw: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Quantized latents (B, D, h, w), whose gradient passes to the latents unchanged (straight-through), and the commitment loss."""
        z_ND = as_rows(z_BDhw)
        quantized_ND = self.model.codebook.lookup(codes.flatten())
        commitment = F.mse_loss(z_ND, quantized_ND.detach())
        straight_through_ND = z_ND + (quantized_ND - z_ND).detach()
        B, _, h, w = z_BDhw.shape
        return straight_through_ND.view(B, h, w, -1).permute(0, 3, 1, 2).contiguous(), commitment

    def update_codebook(self, z_ND: Tensor, step: int) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Update the codebook by the latents of this process's images, with those of the others.

        Returns:
            Codes (N,) of this process's latents, None before the first step that quantizes; how much of the codebook is in use.
        """
        codebook, config, world = self.model.codebook, self.config, self.world
        # 1. The codebook is initialized from the latents of the last batches that were not quantized.
        if step < self.first_quantized:
            self.recent = [*self.recent[1 - RECENT_BATCHES :], self.sample(world.concatenate(z_ND))]
        if step == self.first_quantized:
            codebook.initialize(torch.cat([*self.recent, self.sample(world.concatenate(z_ND))]), self.generator)
            world.copy_first(codebook.buffers())
            self.recent = []
        # 2. It follows the latents by moving averages, with restarts until a share of the steps.
        codes_N = codebook.nearest(z_ND)
        counts_E, sums_ED = map(world.add, codebook.statistics(z_ND, codes_N))
        if step < self.first_quantized:
            return None, use_statistics(counts_E)
        codebook.update(counts_E, sums_ED, config.codebook_decay)
        if step % RESTART_EVERY == RESTART_EVERY - 1 and step < config.restart_until * config.steps:
            codebook.restart(world.concatenate(z_ND), config.restart_below, self.generator)
            world.copy_first(codebook.buffers())
        return codes_N, use_statistics(counts_E)

    def sample(self, z_ND: Tensor) -> Tensor:
        """Of a batch's latents as many as are kept until the codebook is initialized from :data:`LATENTS_PER_ENTRY` for each entry."""
        batches = 1 + min(RECENT_BATCHES, self.first_quantized)
        return z_ND[:: max(1, len(z_ND) * batches // (LATENTS_PER_ENTRY * self.config.codebook_size))].clone()

    def discriminator_backward(self, found: Losses, share: float) -> Tensor:
        """Add the gradients of the discriminator's hinge loss; returns the loss."""
        assert self.discriminator is not None
        with autocast(self.config, self.world.device):
            loss = hinge_loss(self.discriminator, found.images_B3HW, found.output_B3HW.detach())
        (loss * share).backward()
        return loss

    def update(self, step: int) -> Tensor:
        """Update encoder and decoder, and the discriminator from its start on; returns the norm of the gradient of the former."""
        config = self.config
        for network in self.networks:
            sum_gradients(network.parameters(), self.world)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = learning_rate_at(
            step, peak=config.learning_rate, steps=config.steps, warmup_steps=config.warmup_steps, final=FINAL_LEARNING_RATE
        )
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, rate)
            optimizer.step()
        for optimizer in self.discriminator_optimizers:
            set_learning_rate(optimizer, config.learning_rate)
            optimizer.step()
        return norm

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        parts = {"model": self.model} | ({"discriminator": self.discriminator} if self.discriminator is not None else {})
        parameters = {f"{part}.{name}": tensor for part, network in parts.items() for name, tensor in network.named_parameters()}
        names: dict[Tensor, str] = {tensor: name for name, tensor in parameters.items()}
        codebook = {f"codebook.{name}": tensor for name, tensor in self.model.codebook.named_buffers()}
        recent = {f"recent.{number}": z_ND for number, z_ND in enumerate(self.recent)}
        states = state_tensors([*self.optimizers, *self.discriminator_optimizers], names)
        return {**parameters, **codebook, **recent, **states}

    def state(self) -> dict[str, Any]:
        recent = [list(z_ND.shape) for z_ND in self.recent]
        return {"generator": self.generator.get_state().tolist(), "recent": recent}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.recent = [torch.empty(shape, device=self.world.device) for shape in state["recent"]]
        self.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))


def as_rows(z_BDhw: Tensor) -> Tensor:
    """Latents (B, D, h, w) as (N, D)."""
    return z_BDhw.permute(0, 2, 3, 1).reshape(-1, z_BDhw.shape[1])


def train_image_tokenizer(
    images: Images,
    config: ImageTokenizerConfig,
    seed: int,
    world: World = ALONE,
    log: Log = lambda metrics, step: None,
    checkpoints: Checkpoints | None = None,
) -> ImageTokenizer:
    """Train on uint8 images (n, image_size, image_size, 3); see :func:`cm3leon.training.loop.train`.

    Raises:
        UserError: if the loss is not finite.
    """
    trainer = ImageTokenizerTrainer(config, images, seed, world)
    train(trainer, config.steps, "image_tokenizer", world, log, checkpoints)
    mark_used(trainer.model.eval(), images, seed)
    return trainer.model


def mark_used(model: ImageTokenizer, images: Images, seed: int) -> None:
    """Leave to :meth:`~cm3leon.models.vqgan.ImageTokenizer.encode` only the codes that training images have.

    The others lie among them, because entries restart at latents. An image that differs a little from all of training, such as a generated
    one, would get codes that no decoder has read.
    """
    chosen = np.random.default_rng(seed).permutation(len(images))[:COUNTED_IMAGES]
    used = torch.zeros_like(model.codebook.used)
    for pixels_BHW3 in batches_of(images, np.array_split(chosen, -(-len(chosen) // 64))):
        used[model.encode(to_channels_first(torch.from_numpy(pixels_BHW3), used.device)).flatten()] = True
    model.codebook.used.copy_(used)


def step_memory(config: ImageTokenizerConfig, processes: int) -> StepMemory:
    """The memory of a step on each of ``processes`` GPUs, with all losses."""
    config = on_a_gpu(config).model_copy(update={"perceptual_weights": None})  # weights of any value have the same size
    trainer = ImageTokenizerTrainer(config, np.zeros((config.batch_size, 1, 1, 3), np.uint8), 0, DryWorld(0, processes))
    rows = micro_batch(config, processes)
    several = min(2 * rows, -(-config.batch_size // processes))  # two micro-batches take as much as any number
    step = max(trainer.first_quantized + 1, config.adversarial_start)
    step += step % RESTART_EVERY == RESTART_EVERY - 1
    frozen = trainer.perceptual.parameters() if trainer.perceptual is not None else ()
    return measure(
        lambda: trainer.backward(torch.empty(several, config.image_size, config.image_size, 3, dtype=torch.uint8), step),
        [parameter for network in trainer.networks for parameter in network.parameters()],
        [*trainer.tensors().values(), *frozen],
    )
