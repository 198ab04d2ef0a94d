"""Stage ``encoder``: the CLIP bi-encoder, pretrained weights or a small model trained on the train split."""

from __future__ import annotations

import numpy as np
import pandas as pd

from cm3leon.config import paths
from cm3leon.config.schema import Config, ConfigError, EncoderConfig
from cm3leon.data.manifest import ImageStore, first_caption, read_manifest
from cm3leon.data.pixels import ImageSet
from cm3leon.models.clip import Encoder
from cm3leon.tracking import runs
from cm3leon.training import clip
from cm3leon.utils.device import default_device
from cm3leon.utils.progress import progress

HELD_OUT = 256
LOG_EVERY = 20


def paired(manifest: pd.DataFrame) -> pd.DataFrame:
    """The rows that have both an image and a caption."""
    return manifest[manifest["image"].notna() & manifest["captions"].map(len).gt(0)].reset_index(drop=True)


def recall(queries: np.ndarray, targets: np.ndarray) -> float:
    """Share of rows of ``queries`` whose most similar row of ``targets`` is the one at the same position."""
    return float((np.argmax(queries @ targets.T, axis=1) == np.arange(len(queries))).mean()) if len(queries) else 0.0


def held_out_figures(encoder: Encoder, rows: pd.DataFrame, store: ImageStore) -> dict[str, float]:
    """Retrieval among the first :data:`HELD_OUT` val documents by first caption, and the mean cosine of true pairs."""
    rows = rows.iloc[:HELD_OUT]
    texts = encoder.encode_texts([first_caption(captions) for captions in rows["captions"]])
    images = encoder.encode_refs(store, rows["image"].tolist())
    return {
        "recall_text_to_image": recall(texts, images),
        "recall_image_to_text": recall(images, texts),
        "clip_score": float((texts * images).sum(axis=1).mean()) if len(rows) else 0.0,
    }


def make(config: EncoderConfig, seed: int, store: ImageStore, rows: pd.DataFrame, run: runs.Run) -> Encoder:
    """Pretrained or newly trained, as the configuration says."""
    if config.pretrained_model:
        if not config.pretrained_weights:
            raise ConfigError("encoder.pretrained_model needs encoder.pretrained_weights, an open_clip tag or the path of a checkpoint")
        return Encoder.pretrained(config.pretrained_model, config.pretrained_weights)
    images = ImageSet(store, rows["image"].tolist(), config.image_size)
    with progress("encoder", config.steps, "steps") as meter:

        def on_step(step: int, loss: float) -> None:
            meter.advance(note=f"loss {loss:.3f}")
            if step % LOG_EVERY == 0 or step == config.steps - 1:
                run.log_metrics({"encoder/loss": loss}, step)

        return clip.train(config, images, rows["captions"].tolist(), seed, default_device(), on_step)


def run(config: Config) -> dict[str, float]:
    """Writes ``models/encoder/``; returns retrieval figures on the val split."""
    section = config.encoder
    store = ImageStore(paths.RAW)
    with runs.stage_run("encoder", config) as run:
        run.log_dataset(paths.RAW, "raw")
        run.log_dataset(paths.VALIDATED, "validated")
        rows = paired(read_manifest(paths.VALIDATED, "train", ["image", "captions"]))
        encoder = make(section, config.seed, store, rows, run)
        encoder.save(paths.ENCODER)
        held_out = paired(read_manifest(paths.VALIDATED, "val", ["image", "captions"]))
        figures = held_out_figures(encoder.to(default_device()), held_out, store)
        figures["parameters"] = float(sum(p.numel() for p in encoder.model.parameters()))
        run.log_metrics({f"encoder/{name}": value for name, value in figures.items()})
    return figures
