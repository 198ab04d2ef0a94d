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
from cm3leon.training.dry_run import refuse_too_large
from cm3leon.training.loop import stage_checkpoints
from cm3leon.training.super_resolution import step_memory, train
from cm3leon.utils.world import world

VALIDATION_IMAGES = 256


def run(config: Config) -> dict[str, float]:
    """Write ``models/super_resolution/``; returns PSNR (dB) and SSIM on val, of the network and of bicubic interpolation."""
    section, image_size = config.super_resolution, config.image_tokenizer.image_size
    store = ImageStore(paths.RAW)
    with world() as processes, runs.stage_run("super_resolution", config) as run:
        refuse_too_large("super_resolution", section, lambda changed, count: step_memory(changed, image_size, count), processes)
        manifest = read_manifest(paths.VALIDATED, columns=["image", "width", "height", "split"])
        records = manifest[manifest["image"].notna()]
        training = records[records["split"] == "train"]
        side = target_side(training, image_size, section.scale)
        inputs, more = [paths.RAW, paths.VALIDATED / "manifest.parquet"], {"image_tokenizer.image_size": str(image_size)}
        checkpoints = stage_checkpoints(config, "super_resolution", inputs, processes, more)
        images = ImageSet(store, training["image"].tolist(), side)
        model = train(
            section,
            images,
            config.seed,
            processes,
            lambda metrics, step: run.log_metrics({f"super_resolution/{k}": v for k, v in metrics.items()}, step),
            checkpoints,
        )
        run.log_metrics({f"super_resolution/{name}": value for name, value in images.decoded_per_second().items()})
        metrics = {}
        if processes.rank == 0:
            model.save(paths.SUPER_RESOLUTION)
            checkpoints.finish()
            held_out = ImageSet(store, records[records["split"] == "val"]["image"].tolist()[:VALIDATION_IMAGES], side)
            metrics = {name: float(np.mean(scores)) for name, scores in restoration_scores(model, held_out).items()}
            run.log_metrics({f"super_resolution/{name}": value for name, value in metrics.items()})
        processes.wait()
    return metrics
