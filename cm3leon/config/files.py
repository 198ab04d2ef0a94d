"""The files that parameters name: a run that lacks one is refused before it starts, and not days later by the stage that needs it."""

from __future__ import annotations

import os
from pathlib import Path

from cm3leon.config import paths
from cm3leon.config.schema import DOWNLOAD, Config
from cm3leon.utils.errors import ConfigError


def named_files(config: Config) -> dict[str, str]:
    """Parameter -> the file or directory that it names, of those that a run with these parameters reads. Without the collection."""
    tokenizer, weights = config.image_tokenizer, config.encoder.pretrained_weights
    found = {
        "image_tokenizer.pretrained": tokenizer.pretrained,
        "image_tokenizer.perceptual_weights": tokenizer.perceptual_weights if tokenizer.perceptual_weight else None,
        "encoder.pretrained_weights": weights if config.encoder.pretrained_model and weights and _is_a_path(weights) else None,
        "evaluate.inception": None if config.evaluate.inception == DOWNLOAD else config.evaluate.inception,
    }
    return {name: path for name, path in found.items() if path}


def _is_a_path(weights: str) -> bool:
    """Whether weights of the encoder are a file; else they are a tag of open_clip, which has neither a directory nor a suffix."""
    path = Path(weights)
    return path.name != weights or path.suffix in (".pt", ".pth", ".bin", ".safetensors") or path.is_file()


def check_files(config: Config) -> None:
    """Raise :class:`ConfigError` if parameters name files that are not there, or lie where DVC would not notice that they change."""
    named = named_files(config)
    missing = [f"{name} {path}" for name, path in named.items() if not Path(path).exists()]
    if missing:
        raise ConfigError(f"not there: {'; '.join(missing)}. Put the files there, or set other paths by: cm3leon configure")
    # DVC follows links in the directory, so what counts is where the name lies and not the file.
    place = Path.cwd() / paths.WEIGHTS
    outside = [f"{name} {path}" for name, path in named.items() if place not in Path(os.path.normpath(Path.cwd() / path)).parents]
    if outside:
        where = f"{paths.WEIGHTS}, the only place in which stages notice that weights change"
        raise ConfigError(f"not in {where}: {'; '.join(outside)}. Move the files there, or link to them, and name that path")
