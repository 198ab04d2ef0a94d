"""Stage ``super_resolution``: train the upscaler on the train images; compare it with bicubic interpolation on val."""

from __future__ import annotations

import numpy as np

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.data.manifest import ImageStore, read_manifest
from cm3leon.data.pixels import ImageSet
from cm3leon.evaluation.upscaling import restoration_scores
from cm3leon.models.super_resolution import target_side
from cm3leon.tracking import runs
from cm3leon.training.super_resolution import train
from cm3leon.utils.device import default_device
from cm3leon.utils.progress import progress

VALIDATION_IMAGES = 256
LOG_EVERY = 20


def run(config: Config) -> dict[str, float]:
    """Write ``models/super_resolution/``; returns PSNR (dB) and SSIM on val, of the network and of bicubic interpolation."""
    section = config.super_resolution
    store = ImageStore(paths.RAW)
    with runs.stage_run("super_resolution", config) as run:
        manifest = read_manifest(paths.VALIDATED, columns=["image", "width", "height", "split"])
        records = manifest[manifest["image"].notna()]
        training = records[records["split"] == "train"]
        side = target_side(training, config.image_tokenizer.image_size, section.scale)
        images = ImageSet(store, training["image"].tolist(), side)
        with progress("super_resolution", section.steps, "steps") as meter:

            def on_step(step: int, loss: float) -> None:
                meter.advance(note=f"loss {loss:.4f}")
                if step % LOG_EVERY == 0 or step == section.steps - 1:
                    run.log_metrics({"super_resolution/loss": loss}, step)

            model = train(section, images, config.seed, default_device(), on_step)
        model.save(paths.SUPER_RESOLUTION)
        held_out = ImageSet(store, records[records["split"] == "val"]["image"].tolist()[:VALIDATION_IMAGES], side)
        metrics = {name: float(np.mean(scores)) for name, scores in restoration_scores(model, held_out).items()}
        run.log_metrics({f"super_resolution/{name}": value for name, value in metrics.items()})
    return metrics
