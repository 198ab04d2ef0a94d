"""Stage ``encoder``: the CLIP bi-encoder, pretrained weights or a small model trained on the train split."""

from __future__ import annotations

import pandas as pd

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.data.manifest import ImageStore, first_caption, read_manifest
from cm3leon.data.pixels import ImageSet
from cm3leon.models.clip import Encoder
from cm3leon.tracking import runs
from cm3leon.training import clip
from cm3leon.training.checkpoint import Checkpoints
from cm3leon.training.dry_run import refuse_too_large
from cm3leon.training.loop import stage_checkpoints
from cm3leon.utils.world import World, world

VALIDATION_RECORDS = 256


def captioned(split: str) -> pd.DataFrame:
    """The records of a split that have both an image and a caption."""
    manifest = read_manifest(paths.VALIDATED, split, ["image", "captions"])
    return manifest[manifest["image"].notna() & manifest["captions"].map(len).gt(0)].reset_index(drop=True)


def make_encoder(config: Config, processes: World, run: runs.Run) -> tuple[Encoder, Checkpoints | None]:
    """Pretrained open_clip weights if ``pretrained_model`` is set, else a model trained on the train split, and its checkpoints."""
    section = config.encoder
    if section.pretrained_model:
        assert section.pretrained_weights
        return Encoder.pretrained(section.pretrained_model, section.pretrained_weights), None
    refuse_too_large("encoder", section, clip.step_memory, processes)
    records = captioned("train")
    checkpoints = stage_checkpoints(config, "encoder", [paths.RAW, paths.VALIDATED / "manifest.parquet"], processes)
    images = ImageSet(ImageStore(paths.RAW), records["image"].tolist(), section.image_size)
    encoder = clip.train(
        section,
        images,
        records["captions"].tolist(),
        config.seed,
        processes,
        lambda metrics, step: run.log_metrics({f"encoder/{k}": v for k, v in metrics.items()}, step),
        checkpoints,
    )
    run.log_metrics({f"encoder/{name}": value for name, value in images.decoded_per_second().items()})
    return encoder, checkpoints


def run(config: Config) -> dict[str, float]:
    """Write ``models/encoder/``; returns retrieval recall and mean CLIP score on val, and the number of parameters."""
    with world() as processes, runs.stage_run("encoder", config) as run:
        run.log_dataset(paths.RAW, "raw")
        run.log_dataset(paths.VALIDATED, "validated")
        encoder, checkpoints = make_encoder(config, processes, run)
        metrics = {}
        if processes.rank == 0:
            encoder.save(paths.ENCODER)
            if checkpoints is not None:
                checkpoints.finish()
            held_out = captioned("val").iloc[:VALIDATION_RECORDS]
            captions = [first_caption(captions) for captions in held_out["captions"]]
            metrics = clip.validate(encoder.to(processes.device), ImageStore(paths.RAW), held_out["image"].tolist(), captions)
            metrics["parameters"] = float(sum(p.numel() for p in encoder.model.parameters()))
            run.log_metrics({f"encoder/{name}": value for name, value in metrics.items()})
        processes.wait()
    return metrics
