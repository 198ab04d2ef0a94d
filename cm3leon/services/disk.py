"""Disk space: what a run will write, by its parameters and its source, and what there is. Runs without a GPU and without torch.

The estimate is for a run of the named stages from nothing, checkpoints apart that it replaces. It holds within a factor of two
(``tests/flows/test_whole_project.py``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from cm3leon.config.paths import CHECKPOINTS
from cm3leon.config.schema import Config, ImageTokenizerConfig, TrainConfig
from cm3leon.utils.errors import UserError

FLOAT = 4
"""Bytes of a parameter: weights are kept in float32."""
COPIES = 2
"""Of a stage's output: one in the working tree, one in DVC's cache."""
SCENE_BYTES_PER_PIXEL = 0.6
"""Of a painted scene as PNG, with its share of condition images and its row of the manifest."""
DOCUMENT_BYTES = {"validate": 250, "tokenize": 400, "index": 100, "retrieve": 120}
"""What a stage writes of a document, without codes and embeddings."""
PRETRAINED_ENCODER = 1_700_000_000
"""Weights of ViT-L-14, the largest of the usual ones."""
PAGES = 2_000_000
"""Sheets and pages of a stage: Data Docs, samples."""
STORES = 10_000_000
"""MLflow's and Prefect's databases, logs and the code of a registered model."""


class DiskFullError(UserError):
    """A run would fill the disk."""


def tree_size(path: Path) -> int:
    """Bytes of a file, or of all files of a directory; 0 if it does not exist."""
    if path.is_file():
        return path.stat().st_size
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file() and not entry.is_symlink())


def readable(size: float) -> str:
    """``size`` bytes in a decimal unit: "1.5 GB"."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 1e3:,.0f} kB"


# --- estimate --------------------------------------------------------------------------------------------------------


def estimate(config: Config) -> dict[str, float]:
    """Bytes that each stage, and ``register``, writes."""
    documents, images = _source(config)
    decoder = FLOAT * _decoder_parameters(config)
    per_document = {
        name: size * documents
        for name, size in {
            **DOCUMENT_BYTES,
            "tokenize": DOCUMENT_BYTES["tokenize"] + 2 * config.image_tokenizer.tokens_per_image,
            "index": DOCUMENT_BYTES["index"] + 2 * FLOAT * config.encoder.embedding_dim,
        }.items()
    }
    upscaler = config.super_resolution
    outputs = {
        "ingest": images,
        **per_document,
        "validate": per_document["validate"] + PAGES,
        "image_tokenizer": FLOAT * _image_tokenizer_parameters(config.image_tokenizer),
        "text_tokenizer": 60 * config.text_tokenizer.vocabulary_size,
        "encoder": _encoder_bytes(config),
        "pretrain": decoder,
        "sft": decoder,
        "super_resolution": FLOAT * 9 * upscaler.channels**2 * (2 * upscaler.blocks + upscaler.scale**2),
        "evaluate": PAGES,
    }
    written = {stage: COPIES * size for stage, size in outputs.items()}
    for stage, size in _checkpoint_bytes(config).items():
        written[stage] += size
    # A registered model is a copy of the bundle in MLflow's store; the bundle itself is made of hard links.
    bundled = ("image_tokenizer", "text_tokenizer", "encoder", "index", "tokenize", "sft", "super_resolution", "evaluate")
    return {**written, "register": sum(outputs[stage] for stage in bundled) + STORES}


def _source(config: Config) -> tuple[float, float]:
    """Number of documents, and bytes of their images."""
    if config.ingest.source == "shapes":
        scenes = config.ingest.shapes
        count = scenes.count * (1 + scenes.edits)
        return count, count * SCENE_BYTES_PER_PIXEL * scenes.size**2
    collection = Path(config.ingest.path)
    return sum(1 for path in collection.rglob("*") if path.is_file()), tree_size(collection)


def _decoder_parameters(config: Config) -> int:
    """Those of the embeddings and of the blocks' matrices (four of attention, eight of the feed-forward, as wide as the model)."""
    model, images = config.pretrain.model, config.image_tokenizer
    tokens = config.text_tokenizer.vocabulary_size + images.codebook_size + model.sentinels + model.reserved + model.context
    return tokens * model.width + 12 * model.layers * model.width**2


def _checkpoint_bytes(config: Config) -> dict[str, float]:
    """The most that the checkpoints of a stage take at a time."""
    decoder = FLOAT * _decoder_parameters(config)
    sections: dict[str, TrainConfig] = {"pretrain": config.pretrain, "sft": config.sft}
    return {stage: _checkpoints(section) * decoder * _training_state(config, section) for stage, section in sections.items()}


def _training_state(config: Config, section: TrainConfig) -> float:
    """Size of a checkpoint in decoders: weights, and the optimizer's moments, of which Muon has one for the blocks' matrices."""
    model = config.pretrain.model
    blocks = 12 * model.layers * model.width**2 / _decoder_parameters(config)
    return 3 - (blocks if section.optimizer == "muon" else 0)


def _checkpoints(section: TrainConfig) -> int:
    """The most checkpoints at a time: the newest, the best and the one being written."""
    return min(section.keep_checkpoints + 2, section.steps // section.checkpoint_every + -(-section.steps // section.validate_every))


def _image_tokenizer_parameters(section: ImageTokenizerConfig) -> int:
    """Two convolutions a block: of encoder_kernel in the encoder, of three in the decoder; and the codebook."""
    convolutions = 2 * (section.blocks * section.encoder_kernel**2 + section.decoder_blocks * 9)
    return sum(convolutions * (section.channels * m) ** 2 for m in section.multipliers) + section.codebook_size * section.embedding_dim


def _encoder_bytes(config: Config) -> int:
    section = config.encoder
    if section.pretrained_model:
        return PRETRAINED_ENCODER
    # A resnet's width grows from w to 32 w: about 5,000 w^2 parameters with one block a stage.
    image = (5000 if section.image_tower == "resnet" else 12) * section.layers * section.width**2
    text = 12 * section.text_layers * section.text_width**2 + section.vocabulary_size * section.text_width
    return FLOAT * (image + text)


# --- check -----------------------------------------------------------------------------------------------------------


def _replaced(checkpoints: Path) -> int:
    """Bytes of checkpoints of a stage that its next run removes or replaces: of finished runs, and of the unfinished one written to last.

    That one resumes, unless parameters, data or code have changed; older unfinished runs stay as they are.
    """
    runs = sorted((record.parent for record in checkpoints.glob("*/run.json")), key=lambda run: run.stat().st_mtime)
    unfinished = [run for run in runs if run.suffix != ".part" and not _is_finished(run)]
    return sum(tree_size(run) for run in runs if run not in unfinished[:-1])


def _is_finished(run: Path) -> bool:
    """What ``run.json`` says (:class:`cm3leon.training.checkpoint_runs.RunRecord`, which needs torch)."""
    try:
        return json.loads((run / "run.json").read_text())["finished"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_disk(config: Config, stages: Iterable[str], root: Path = Path()) -> str:
    """Compare what stages will write with the free space; returns both in a sentence.

    Args:
        stages: those that are out of date; none: nothing is written.
        root: of the project.

    Raises:
        DiskFullError: if it does not fit.
    """
    known = estimate(config)
    present = {stage: min(size, _replaced(root / CHECKPOINTS / stage)) for stage, size in _checkpoint_bytes(config).items()}
    needed = {stage: known[stage] - present.get(stage, 0) for stage in stages if stage in known}
    if needed:
        needed["register"] = known["register"]
    total, free = sum(needed.values()), shutil.disk_usage(root).free
    largest = sorted(needed, key=lambda stage: -needed[stage])[:3]
    shown = ", ".join(f"{stage} {readable(needed[stage])}" for stage in largest)
    writes = f"about {readable(total)} ({shown})" if shown else "nothing"
    line = f"this run writes {writes}; {readable(free)} are free on the disk of {root.absolute()}"
    if total > free:
        raise DiskFullError(
            f"{line}; make room by cm3leon gc, keep fewer checkpoints (pretrain.keep_checkpoints, sft.keep_checkpoints), "
            "or work in a clone on a larger disk"
        )
    return f"disk: {line}"
