"""Stage ``image_tokenizer``: train the VQ-GAN on the train split, or import one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.data.manifest import ImageStore, read_manifest
from cm3leon.data.pixels import ImageSet
from cm3leon.models.vqgan import ImageTokenizer, reconstruct
from cm3leon.sequence.tasks import CONDITIONS
from cm3leon.tracking import runs
from cm3leon.training.checkpoint import Checkpoints
from cm3leon.training.dry_run import refuse_too_large
from cm3leon.training.loop import stage_checkpoints
from cm3leon.training.vqgan import code_statistics, psnr, step_memory, train_image_tokenizer
from cm3leon.utils.errors import ConfigError
from cm3leon.utils.images import save_pairs
from cm3leon.utils.world import World, world

VALIDATION_IMAGES = 512
SHEET_IMAGES = 16


def training_images(manifest: pd.DataFrame, condition_share: float, seed: int) -> list[str]:
    """The records' images, and a random sample of their condition images that makes up ``condition_share`` of all, if there are enough.

    The image tokenizer has to encode condition images (edges, depth ...) too, and they look unlike the others.
    """
    images = manifest["image"].tolist()
    conditions = [item["image"] for items in manifest["conditions"] for item in items if item["kind"] in CONDITIONS]
    count = min(round(len(images) * condition_share / (1 - condition_share)), len(conditions))
    chosen = np.random.default_rng((seed, 4)).permutation(len(conditions))[:count]
    return images + [conditions[int(number)] for number in chosen]


def make_tokenizer(config: Config, processes: World, run: runs.Run) -> tuple[ImageTokenizer, Checkpoints | None]:
    """The imported image tokenizer if ``pretrained`` names one, else one that is trained on the train split, and its checkpoints."""
    section = config.image_tokenizer
    if section.pretrained:
        imported = ImageTokenizer.load(Path(section.pretrained), processes.device)
        if imported.spec.image_size != section.image_size:
            raise ConfigError(
                f"the image tokenizer in {section.pretrained} has images of {imported.spec.image_size} px, image_tokenizer.image_size is "
                f"{section.image_size}: set it to {imported.spec.image_size}, as other stages read it"
            )
        return imported, None
    refuse_too_large("image_tokenizer", section, step_memory, processes)
    manifest = read_manifest(paths.VALIDATED, "train", ["image", "conditions"])
    images = ImageSet(ImageStore(paths.RAW), training_images(manifest, section.condition_share, config.seed), section.image_size)
    weights = [Path(section.perceptual_weights)] if section.perceptual_weights else []
    checkpoints = stage_checkpoints(config, "image_tokenizer", [paths.RAW, paths.VALIDATED / "manifest.parquet", *weights], processes)
    model = train_image_tokenizer(
        images,
        section,
        config.seed,
        processes,
        lambda metrics, step: run.log_metrics({f"image_tokenizer/{k}": v for k, v in metrics.items()}, step),
        checkpoints,
    )
    run.log_metrics({f"image_tokenizer/{name}": value for name, value in images.decoded_per_second().items()})
    return model, checkpoints


def run(config: Config) -> dict[str, float]:
    """Write ``models/image_tokenizer/`` with ``reconstructions.png``; returns PSNR (dB) on val and the codebook's usage and perplexity."""
    with world() as processes, runs.stage_run("image_tokenizer", config) as run:
        run.log_dataset(paths.RAW, "raw")
        run.log_dataset(paths.VALIDATED, "validated")
        model, checkpoints = make_tokenizer(config, processes, run)
        metrics = {}
        if processes.rank == 0:
            model.save(paths.IMAGE_TOKENIZER)
            if checkpoints is not None:
                checkpoints.finish()
            metrics = evaluate(model, run)
        processes.wait()
    return metrics


def evaluate(model: ImageTokenizer, run: runs.Run) -> dict[str, float]:
    """PSNR and use of the codebook on val; writes and logs the sheet."""
    held_out = read_manifest(paths.VALIDATED, "val")["image"].tolist()[:VALIDATION_IMAGES]
    originals = torch.from_numpy(ImageSet(ImageStore(paths.RAW), held_out, model.spec.image_size)[np.arange(len(held_out))])
    codes, reconstructions = reconstruct(model, originals)
    metrics = {"psnr": psnr(originals, reconstructions), **code_statistics(codes, model.spec.codebook_size)}
    run.log_metrics({f"image_tokenizer/val_{k}": v for k, v in metrics.items()})
    sheet = paths.IMAGE_TOKENIZER / "reconstructions.png"
    save_pairs(originals[:SHEET_IMAGES].numpy(), reconstructions[:SHEET_IMAGES].numpy(), sheet)
    run.log_image(sheet, sheet.stem)
    return metrics
