"""Small trainers of image tokenizer, encoder and upscaler."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from cm3leon.config.schema import EncoderConfig, ImageTokenizerConfig, SuperResolutionConfig
from cm3leon.models.clip import ClipTokenizer
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.training import loop, vqgan
from cm3leon.training.checkpoint import Checkpoints
from cm3leon.training.clip import EncoderTrainer
from cm3leon.training.super_resolution import SuperResolutionTrainer
from cm3leon.utils.world import ALONE, World, world

KINDS = ("image_tokenizer", "encoder", "super_resolution")
STEPS = 10
STOPPED = 7
COLORS = ("red", "green", "blue", "white", "black", "gray")
RUN = {"steps": STEPS, "batch_size": 7}
CONFIGS = {
    "image_tokenizer": ImageTokenizerConfig(
        **RUN, image_size=16, patch=2, channels=8, multipliers=[1, 2], embedding_dim=4, codebook_size=8, encoder_kernel=3, warmup_steps=2,
        learning_rate=1e-3, adversarial_weight=0.1, adversarial_start=5, continuous_share=0.3, restart_below=0.5, restart_until=0.8,
    ),
    "encoder": EncoderConfig(
        **RUN, image_tower="vit", image_size=16, patch_size=8, width=32, text_width=32, text_layers=1, embedding_dim=16,
        vocabulary_size=300, context_length=16, warmup_steps=2, learning_rate=1e-3, hard_negatives=2,
    ),
    "super_resolution": SuperResolutionConfig(**RUN, channels=8, blocks=1, patch_size=8, learning_rate=1e-3),
}  # fmt: skip


class Squares:
    """Images of four flat quarters in random colors, with noise."""

    def __init__(self, count: int = 20, size: int = 16, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        quarters = rng.integers(0, 200, size=(count, 2, 2, 3)).repeat(size // 2, axis=1).repeat(size // 2, axis=2)
        self.pixels, self.size = (quarters + rng.integers(0, 50, size=quarters.shape)).astype(np.uint8), size
        self.captions = [[f"a {COLORS[n % 6]} circle on {COLORS[n // 6 % 6]}", f"{COLORS[n * 5 % 6]} square {n % 7}"] for n in range(count)]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        return self.pixels[positions]


def tokenizer_of(config: EncoderConfig, images: Squares) -> ClipTokenizer:
    texts = [caption for own in images.captions for caption in own]
    return ClipTokenizer(TextTokenizer.train(texts, config.vocabulary_size), config.context_length)


def make_trainer(kind: str, processes: World = ALONE, **changes: object) -> loop.Trainer:
    """A trainer with a batch of 7, which divides evenly into nothing."""
    config, images = CONFIGS[kind].model_copy(update=changes), Squares()
    if kind == "encoder":
        return EncoderTrainer(config, images, images.captions, tokenizer_of(config, images), 0, processes)
    return {"image_tokenizer": vqgan.ImageTokenizerTrainer, "super_resolution": SuperResolutionTrainer}[kind](config, images, 0, processes)


@contextmanager
def every_step() -> Iterator[None]:
    """Every step is logged, and the codebook's unused entries are restarted at every third."""
    before = loop.LOG_EVERY, vqgan.RESTART_EVERY
    loop.LOG_EVERY, vqgan.RESTART_EVERY = 1, 3
    try:
        yield
    finally:
        loop.LOG_EVERY, vqgan.RESTART_EVERY = before


def run(trainer: loop.Trainer, directory: Path | None = None, stop: int | None = None, processes: World = ALONE, **options: float) -> list:
    """Train to the end; the metrics of each step.

    Args:
        directory: of the checkpoints.
        stop: this process gets a SIGTERM in the step with this number.
    """
    curve = []

    def log(metrics: dict[str, float], step: int) -> None:
        if "loss" in metrics:  # the last are of the whole run
            curve.append(metrics)
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    checkpoints = Checkpoints(directory, {"kind": type(trainer).__name__}, 2, processes) if directory else None
    with every_step():
        loop.train(trainer, STEPS, "image_tokenizer", processes, log, checkpoints, **options)
    return curve


def train_all(directory: Path) -> None:
    """Train each to its end, and again in another directory until a SIGTERM that one process gets; in one process or in several.

    Writes ``losses.json``, and the checkpoints.
    """
    torch.set_num_threads(1)
    curves = {}
    with world() as processes:
        for kind in KINDS:
            trainer = make_trainer(kind, processes, micro_batch_size=2)
            curves[kind] = run(trainer, processes=processes)
            sums = [float(tensor.double().sum()) for tensor in trainer.tensors().values()]
            assert all(found == sums for found in processes.gather(sums)), f"{kind}: the processes have the same weights and codebook"
            with suppress(SystemExit):
                run(make_trainer(kind, processes), directory / kind, STOPPED if processes.rank else None, processes)
                raise AssertionError("a SIGTERM of one process ends both")
        if processes.rank == 0:
            (directory / "losses.json").write_text(json.dumps(curves))
