"""Training of the upscaler: an image of the collection is the target, its bicubic reduction the input.

Shapes: B batch, h w low resolution, H W high resolution.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from cm3leon.config.schema import SuperResolutionConfig
from cm3leon.data.pixels import Images, batches_of
from cm3leon.models.pixels import to_unit
from cm3leon.models.super_resolution import SuperResolution, reduce
from cm3leon.training import loop
from cm3leon.training.checkpoint import Checkpoints
from cm3leon.training.distributed import sum_gradients
from cm3leon.training.dry_run import DryWorld, StepMemory, measure, micro_batch, on_a_gpu
from cm3leon.training.loop import Log, Metrics
from cm3leon.training.optimizer import allocate_states, learning_rate_at, set_learning_rate, state_tensors
from cm3leon.training.precision import autocast
from cm3leon.utils.device import copied_to
from cm3leon.utils.errors import UserError
from cm3leon.utils.world import ALONE, World


class SizedImages(Images, Protocol):
    """Square images of ``size`` pixels."""

    size: int


@dataclass(frozen=True)
class Crop:
    """A square of an image, rotated by quarter turns and flipped or not: one of the eight orientations."""

    top: int
    left: int
    rotation: int
    flipped: int

    def of(self, image: np.ndarray, side: int) -> np.ndarray:
        """The crop of an image (H, W, 3): (side, side, 3)."""
        rotated = np.rot90(image[self.top : self.top + side, self.left : self.left + side], self.rotation)
        return rotated[:, ::-1] if self.flipped else rotated


class SuperResolutionTrainer:
    """One training run: network, optimizer, and the random crops of each step."""

    def __init__(self, config: SuperResolutionConfig, images: SizedImages, seed: int, world: World = ALONE) -> None:
        self.config, self.images, self.seed, self.world = config, images, seed, world
        self.batch_size = config.batch_size
        # Crops are patch_size pixels wide in the input, or the whole image where that is smaller.
        self.side = min(config.patch_size * config.scale, images.size // config.scale * config.scale)
        torch.manual_seed(seed)
        network = SuperResolution(config.scale, config.channels, config.blocks).to(world.device).train()
        self.model = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        allocate_states([self.optimizer])

    def batches(self, first: int) -> Generator[Tensor, None, None]:
        """This process's crops of each step, uint8 (B, 3, H, W); see :class:`~cm3leon.training.loop.Trainer`."""
        own = self.world.share(self.batch_size)
        drawn, again = itertools.tee(self.draw(step, own) for step in itertools.count(first))
        for (_, crops), images in zip(drawn, batches_of(self.images, (positions for positions, _ in again)), strict=False):
            pixels = [crop.of(image, self.side) for crop, image in zip(crops, images, strict=True)]
            yield torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)

    def draw(self, step: int, rows: slice) -> tuple[np.ndarray, Sequence[Crop]]:
        """Positions of random images, and a random crop of each: ``rows`` of a batch, which is the same in every process."""
        rng, count, room = np.random.default_rng((self.seed, step)), self.batch_size, self.images.size - self.side + 1
        positions = rng.integers(len(self.images), size=count)
        crops = [Crop(*rng.integers([room, room, 4, 2]).tolist()) for _ in positions]
        return positions[rows], crops[rows]

    def step(self, number: int, batch: Tensor) -> Metrics:
        """One optimization step; see :class:`~cm3leon.training.loop.Trainer`."""
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.world.add(self.backward(batch))
        sum_gradients(self.model.parameters(), self.world)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = learning_rate_at(number, peak=config.learning_rate, steps=config.steps, warmup_steps=config.steps // 10)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        return {"loss": loss, "gradient_norm": norm}

    def backward(self, high_B3HW: Tensor) -> Tensor:
        """Add the gradients of this process's crops, uint8; returns their part of the batch's loss."""
        total = torch.zeros((), device=self.world.device)
        for part in high_B3HW.split(self.config.micro_batch_size or len(high_B3HW)):
            target_B3HW = copied_to(part, self.world.device)
            low_B3hw = reduce(target_B3HW, self.config.scale)
            with autocast(self.config, self.world.device):
                output_B3HW = self.model(to_unit(low_B3hw)).float()
            loss = l1_loss(output_B3HW, to_unit(target_B3HW)) * (len(part) / self.batch_size)
            loss.backward()
            total += loss.detach()
        return total

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        found = {f"model.{name}": parameter for parameter, name in names.items()} | state_tensors([self.optimizer], names)
        # Views in the order of channels_last, which is that in memory: safetensors has no other.
        return {name: tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor for name, tensor in found.items()}

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing: crops follow from the step."""


def train(
    config: SuperResolutionConfig,
    images: SizedImages,
    seed: int,
    world: World = ALONE,
    log: Log = lambda metrics, step: None,
    checkpoints: Checkpoints | None = None,
) -> SuperResolution:
    """Train on random crops, rotated and flipped, with an L1 loss (as EDSR, arXiv 1707.02921, section 4.2); see :func:`loop.train`.

    The same arguments give the same weights on one machine.

    Raises:
        UserError: if there are no images, or they are smaller than ``scale`` pixels.
    """
    if not len(images):
        raise UserError("super-resolution has no images to train on")
    if images.size < config.scale:
        raise UserError(f"images of {images.size} pixels are too small for a scale of {config.scale}")
    trainer = SuperResolutionTrainer(config, images, seed, world)
    loop.train(trainer, config.steps, "super_resolution", world, log, checkpoints)
    return trainer.model.eval()


def step_memory(config: SuperResolutionConfig, image_size: int, processes: int) -> StepMemory:
    """The memory of a step on each of ``processes`` GPUs.

    Args:
        image_size: side of the images that are upscaled, pixels.
    """
    config = on_a_gpu(config)
    trainer = SuperResolutionTrainer(config, _NoImages(image_size * config.scale), 0, DryWorld(0, processes))
    rows = micro_batch(config, processes)
    several = min(2 * rows, -(-config.batch_size // processes))  # two micro-batches take as much as any number
    return measure(
        lambda: trainer.backward(torch.empty(several, 3, trainer.side, trainer.side, dtype=torch.uint8)),
        trainer.model.parameters(),
        trainer.tensors().values(),
    )


@dataclass
class _NoImages:
    """Images of which only the size is needed."""

    size: int

    def __len__(self) -> int:
        return 0

    def __getitem__(self, positions: np.ndarray, /) -> np.ndarray:
        raise IndexError
