"""The stages by name, and the function that runs a stage's command."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cm3leon.config import paths

if TYPE_CHECKING:
    from cm3leon.config.schema import Config, LaunchConfig

STAGES = {
    "ingest": "Bring the source into image shards and one manifest.",
    "validate": "Profile and check records, quarantine bad ones, assign splits.",
    "image_tokenizer": "Train the VQ-GAN, or import one.",
    "text_tokenizer": "Train byte-level BPE.",
    "tokenize": "Images to codes, captions to token ids.",
    "encoder": "The CLIP bi-encoder: pretrained, or trained here.",
    "index": "Embeddings and the FAISS memory bank.",
    "retrieve": "The neighbor table for training.",
    "pretrain": "CM3 pretraining of the decoder.",
    "sft": "Multitask instruction tuning.",
    "super_resolution": "Train the upscaler.",
    "evaluate": "Evaluate the finished model under a recorded contract.",
}


def launching(stage: str, config: Config) -> LaunchConfig | None:
    """How the processes of a stage are started; None for one that runs in one.

    The decoder trains on the GPUs of several machines, all else uses those of one. A resnet of the encoder needs the whole batch in one
    process, for its batch normalization.
    """
    if stage in ("pretrain", "sft"):
        return config.launch
    encoder = config.encoder
    several = {
        "image_tokenizer": not config.image_tokenizer.pretrained,
        "tokenize": True,
        "encoder": not encoder.pretrained_model and encoder.image_tower == "vit",
        "index": True,
        "super_resolution": True,
        "evaluate": True,
    }
    return config.launch.model_copy(update={"torchrun": ""}) if several.get(stage) else None


def launched(stage: str, *arguments: str, params: Path = paths.PARAMS) -> Config:
    """The parameters, in a process of the stage: where there are to be several, the command with these arguments takes this one's place."""
    from cm3leon.config.loading import load_config
    from cm3leon.training.launch import replace_by_torchrun

    config = load_config(params)
    if launch := launching(stage, config):
        replace_by_torchrun([stage, *arguments], launch)
    if config.launch.image_workers is not None:
        from cm3leon.data import loading

        loading.chosen_workers = config.launch.image_workers
    return config


METRICS = "metrics: "
"""Prefix of the last line that a stage's command prints: headline metrics, seconds and peak memory as JSON, which the flow reads."""


def peak_megabytes() -> float:
    """Peak resident memory of this process, MiB."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    except (OSError, IndexError, ValueError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def run_stage(stage: str, resume_from: Path | None = None, *, accept_changes: bool = False) -> None:
    """Run a stage with ``params.yaml``; its last line is ``metrics: {...}`` (see :data:`METRICS`).

    Args:
        resume_from, accept_changes: of ``pretrain`` and ``sft``; see :func:`~cm3leon.training.run.train`.
    """
    from cm3leon.services.child import end_with_owner

    resumption = ["--resume-from", str(resume_from), *(["--accept-changes"] if accept_changes else [])] if resume_from else []
    config = launched(stage, *resumption)
    end_with_owner()
    start = time.monotonic()
    options = {"resume_from": resume_from, "accept_changes": accept_changes} if resume_from else {}
    metrics = importlib.import_module(f"cm3leon.stages.{stage}").run(config, **options)
    resources = {"seconds": round(time.monotonic() - start, 2), "peak_megabytes": round(peak_megabytes(), 1)}
    if os.environ.get("RANK", "0") == "0":  # torchrun starts several processes
        file = paths.metrics_file(stage)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(metrics) + "\n")  # shown for the stage as long as its outputs are up to date
        print(METRICS + json.dumps({**metrics, **resources}), flush=True)
