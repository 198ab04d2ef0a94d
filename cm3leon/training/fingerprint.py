"""The identity of a training run: parameters, input data, code and torch's version. Only the same run resumes a checkpoint."""

from __future__ import annotations

import ast
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cm3leon.utils.imports import import_closure
from cm3leon.utils.world import World

if TYPE_CHECKING:
    from cm3leon.config.schema import Config

Fingerprint = dict[str, str]
"""Name of a parameter, an input or a part of the code, and its value or hash."""

PACKAGE = Path(__file__).parents[1]
ROOMS = ("models", "sequence", "data", "training")
"""Rooms whose code decides what a training computes. Parameters are in the fingerprint by value, so ``config`` is not followed; neither are
``tracking`` and ``utils``, which only record and show, but for :data:`WORLD`."""
WORLD = "utils/world.py"
"""The module by which processes sum what each of them has computed."""
ASIDE = ("training/memory.py", "training/memory_limit.py", "training/dry_run.py", "training/sample_sheets.py")
"""Modules of these rooms that plan or watch a training."""
NEUTRAL = frozenset(
    {"micro_batch_size", "activation_checkpointing", "validate_every", "validation_samples", "checkpoint_every", "keep_checkpoints"}
)
"""Parameters of training that change how it is computed, watched or kept, and not, but for rounding, what comes out."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_hash(path: Path) -> str:
    """A hash of a file, or of the names and whole contents of all files below a directory.

    Files are hashed in parallel: 0.8 GB/s on each core of a Xeon with SHA instructions, so 100 GB take a minute on two cores.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(file_hash, files))  # hashlib releases the interpreter's lock
    names = [file.relative_to(path).as_posix() if file != path else "" for file in files]
    return _hash_of(zip(names, hashes, strict=True))


def training_modules(stage: str = "pretrain", package: Path = PACKAGE) -> list[Path]:
    """The modules that decide what a training stage computes: its own, and all it imports from :data:`ROOMS` and :data:`WORLD`.

    Left out are those in :data:`ASIDE`.
    """
    start, rooms, aside = package / "stages" / f"{stage}.py", [package / room for room in ROOMS], [package / name for name in ASIDE]

    def decides(file: Path) -> bool:
        return file in (start, package / WORLD) or (file not in aside and any(room in file.parents for room in rooms))

    return import_closure([start], package.parent, decides)


def code_hash(stage: str = "pretrain", package: Path = PACKAGE) -> str:
    """A hash of the names of :func:`training_modules` and their code, without comments, docstrings and layout."""
    return _hash_of((file.relative_to(package).as_posix(), _code(file)) for file in training_modules(stage, package))


def _code(file: Path) -> str:
    """What Python makes of a module's source, without docstrings."""
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # that of a lambda is an expression
            node.body = [  # type: ignore[attr-defined]
                line for line in body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            ]
    return ast.dump(tree)


def _hash_of(parts: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256("".join(f"{name}\0{content}\n" for name, content in parts).encode()).hexdigest()


def fingerprint(config: Config, stage: str, inputs: Sequence[Path]) -> Fingerprint:
    """The fingerprint of a training stage.

    Args:
        stage: a training stage, whose name is that of its section of the parameters too.
        inputs: files and directories that the stage reads.
    """
    from cm3leon.tracking.runs import flatten  # not on a bare machine, which trains without a project

    section = {name: value for name, value in getattr(config, stage).model_dump().items() if name not in NEUTRAL}
    parameters = {f"{stage}.{name}": value for name, value in flatten(section).items()} | {"seed": str(config.seed)}
    return parameters | {str(path): data_hash(path) for path in inputs} | {"code": code_hash(stage), "torch": torch.__version__}


def common_fingerprint(
    config: Config, stage: str, inputs: Sequence[Path], processes: World, more: Mapping[str, str] | None = None
) -> Fingerprint:
    """:func:`fingerprint`, with the entries of ``more``. The first process alone reads the inputs, and all get what it found."""
    own = fingerprint(config, stage, inputs) | dict(more or {}) if processes.rank == 0 else None
    found: Fingerprint = processes.gather(own)[0]
    return found


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """One line for each entry in which two fingerprints differ."""
    return [
        f"{name}: {_short(old.get(name, 'nothing'))} then, {_short(new.get(name, 'nothing'))} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _short(value: str) -> str:
    return value if len(value) <= 40 else value[:12] + "…"
