"""Stage ``encoder``: the CLIP bi-encoder, pretrained weights or a small model trained on the train split."""

from __future__ import annotations

import pandas as pd

from cm3leon.config import paths
from cm3leon.config.schema import Config, EncoderConfig
from cm3leon.data.manifest import ImageStore, first_caption, read_manifest
from cm3leon.data.pixels import ImageSet
from cm3leon.models.clip import Encoder
from cm3leon.tracking import runs
from cm3leon.training import clip
from cm3leon.utils.device import default_device
from cm3leon.utils.errors import ConfigError
from cm3leon.utils.progress import progress

VALIDATION_RECORDS = 256
LOG_EVERY = 20


def captioned(split: str) -> pd.DataFrame:
    """The records of a split that have both an image and a caption."""
    manifest = read_manifest(paths.VALIDATED, split, ["image", "captions"])
    return manifest[manifest["image"].notna() & manifest["captions"].map(len).gt(0)].reset_index(drop=True)


def make_encoder(config: EncoderConfig, seed: int, store: ImageStore, run: runs.Run) -> Encoder:
    """Pretrained open_clip weights if ``config.pretrained_model`` is set, else a model trained on the train split.

    Raises:
        ConfigError: if a pretrained model has no ``pretrained_weights``.
    """
    if config.pretrained_model:
        if not config.pretrained_weights:
            raise ConfigError("encoder.pretrained_model needs encoder.pretrained_weights, an open_clip tag or the path of a checkpoint")
        return Encoder.pretrained(config.pretrained_model, config.pretrained_weights)
    records = captioned("train")
    images = ImageSet(store, records["image"].tolist(), config.image_size)
    with progress("encoder", config.steps, "steps") as meter:

        def on_step(step: int, loss: float) -> None:
            meter.advance(note=f"loss {loss:.3f}")
            if step % LOG_EVERY == 0 or step == config.steps - 1:
                run.log_metrics({"encoder/loss": loss}, step)

        return clip.train(config, images, records["captions"].tolist(), seed, default_device(), on_step)


def run(config: Config) -> dict[str, float]:
    """Write ``models/encoder/``; returns retrieval recall and mean CLIP score on val, and the number of parameters."""
    store = ImageStore(paths.RAW)
    with runs.stage_run("encoder", config) as run:
        run.log_dataset(paths.RAW, "raw")
        run.log_dataset(paths.VALIDATED, "validated")
        encoder = make_encoder(config.encoder, config.seed, store, run)
        encoder.save(paths.ENCODER)
        held_out = captioned("val").iloc[:VALIDATION_RECORDS]
        captions = [first_caption(captions) for captions in held_out["captions"]]
        metrics = clip.validate(encoder.to(default_device()), store, held_out["image"].tolist(), captions)
        metrics["parameters"] = float(sum(p.numel() for p in encoder.model.parameters()))
        run.log_metrics({f"encoder/{name}": value for name, value in metrics.items()})
    return metrics
