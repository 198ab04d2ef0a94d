"""The stages by name, and the function that runs a stage's command."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from cm3leon.config import paths

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


def run_stage(stage: str, **options: Any) -> None:
    """Run a stage with ``params.yaml`` and options of its own; its last line is ``metrics: {...}`` (see :data:`METRICS`)."""
    from cm3leon.config.loading import load_config
    from cm3leon.services.child import end_with_owner

    end_with_owner()
    config = load_config()
    start = time.monotonic()
    metrics = importlib.import_module(f"cm3leon.stages.{stage}").run(config, **options)
    resources = {"seconds": round(time.monotonic() - start, 2), "peak_megabytes": round(peak_megabytes(), 1)}
    if os.environ.get("RANK", "0") == "0":  # torchrun starts several processes
        file = paths.metrics_file(stage)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(metrics) + "\n")  # shown for the stage as long as its outputs are up to date
        print(METRICS + json.dumps({**metrics, **resources}), flush=True)
