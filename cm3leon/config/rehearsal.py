"""The rehearsal of a profile: everything as on the GPUs it is meant for, but sizes for a CPU, and no files or downloads.

Precision, packing, micro-batches, several processes, kinds of index, guidance and candidates stay or are switched on, so that what fails in
a day's run on GPUs fails in minutes before it.
"""

from __future__ import annotations

from typing import Any

from cm3leon.config.loading import parse_config
from cm3leon.config.schema import HEAD_WIDTH, Config

SIZES = {
    "ingest": ("shapes",),
    "validate": (
        "licenses", "min_side", "max_caption_characters", "max_rejected_rate", "near_duplicate_bits", "near_duplicate_similarity",
        "val_fraction", "test_fraction", "workers",
    ),
    "image_tokenizer": (
        "image_size", "patch", "channels", "multipliers", "blocks", "embedding_dim", "codebook_size", "codebook_decay", "steps",
        "batch_size", "learning_rate", "warmup_steps", "adversarial_start",
    ),
    "text_tokenizer": ("vocabulary_size",),
    "tokenize": ("batch_size",),
    "encoder": (
        "image_size", "patch_size", "width", "layers", "embedding_dim", "vocabulary_size", "context_length", "steps", "batch_size",
        "learning_rate", "warmup_steps",
    ),
    "index": ("batch_size",),
    "retrieve": ("max_score", "search_depth"),
    "pretrain": ("steps", "batch_size", "learning_rate", "warmup_steps", "validate_every", "validation_samples", "checkpoint_every"),
    "pretrain.model": ("layers", "width", "heads", "context", "sentinels"),
    "sft": ("steps", "batch_size", "learning_rate", "warmup_steps", "validate_every", "validation_samples", "checkpoint_every"),
    "super_resolution": ("channels", "blocks", "patch_size", "steps", "batch_size", "learning_rate"),
    "decoding": ("candidates", "max_text_tokens"),
    "evaluate": ("prompts", "captions", "questions", "tasks", "max_training_similarity", "sheet", "bootstrap"),
}  # fmt: skip
"""Section -> its keys whose values are those of profile ``tiny``."""

CHANGES: dict[str, dict[str, Any]] = {
    "ingest": {"source": "shapes"},
    "launch": {"processes": 2},
    "image_tokenizer": {"pretrained": None, "perceptual_weight": 0.0, "perceptual_weights": None, "micro_batch_size": 4},
    "encoder": {"pretrained_model": None, "pretrained_weights": None},
    "pretrain": {"micro_batch_size": 2},
    "sft": {"micro_batch_size": 2},
    "super_resolution": {"micro_batch_size": 2},
    "evaluate": {"inception": None},
}
"""Section -> its other keys that change: two processes, two micro-batches in each, and nothing that is not in the repository."""


def rehearsed(config: Config, tiny: Config) -> Config:
    """The rehearsal of a profile's parameters; its name ends in ``-rehearsal``.

    Args:
        tiny: the parameters of profile ``tiny``.
    """
    tree, sizes = config.model_dump(by_alias=True), tiny.model_dump(by_alias=True)
    for section, keys in SIZES.items():
        own, small = tree, sizes
        for name in section.split("."):
            own, small = own[name], small[name]
        own |= {key: small[key] for key in keys}
    for section, values in CHANGES.items():
        tree[section] |= values
    tree["encoder"] |= {"micro_batch_size": 8, "width": HEAD_WIDTH} if config.encoder.image_tower == "vit" else {"micro_batch_size": None}
    tree["profile"] = f"{config.profile}-rehearsal"
    return parse_config(tree, f"the rehearsal of profile {config.profile}")
