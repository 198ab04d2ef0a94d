"""Checkpoints of a training run: complete, verified, and resumed from only by the run that wrote them.

A checkpoint is a directory ``step-00001000``: tensors as safetensors files, one for each process that wrote
(``torch.distributed.checkpoint``, so that any number of processes can read them), ``state.json`` with everything else, and
``checksums.json`` of both. It is written as ``step-00001000.part`` and renamed when complete, so a name without ``.part`` is a complete
checkpoint. The directory of the checkpoints also holds the run's fingerprint: parameters, data and code. A run with another fingerprint
does not resume from them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from cm3leon.training.distributed import World
from cm3leon.training.fingerprint import Fingerprint, differences, file_hash
from cm3leon.utils.errors import UserError


class CheckpointError(UserError):
    """A checkpoint is damaged or of another model; the message names the file and the reason."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, in ``directory``: the ``keep`` newest and the one with the lowest validation loss."""

    directory: Path
    fingerprint: Fingerprint
    keep: int
    world: World = field(default_factory=World)

    def open(self) -> None:
        """Prepare the directory for saving and loading.

        Checkpoints of a run with another fingerprint are moved to ``DIRECTORY.old``, which is replaced; if that run was not finished,
        standard error says what differs. Those of this run are removed if it has finished: it then starts from the beginning.
        """
        if self.world.rank == 0:
            self._prepare()
        self.world.wait()

    def _prepare(self) -> None:
        file = self.directory / "run.json"
        if file.is_file() and self.names():
            run = _read_json(file) or {"fingerprint": {str(file): "damaged"}, "finished": False}
            changed = differences(run["fingerprint"], self.fingerprint)
            if run["finished"] and not changed:
                shutil.rmtree(self.directory)
            elif changed:
                old = self.directory.with_name(self.directory.name + ".old")
                shutil.rmtree(old, ignore_errors=True)
                self.directory.rename(old)
                if not run["finished"]:
                    lines = "\n  ".join(changed)
                    _warn(f"starting from the beginning: the checkpoints in {self.directory} are of another run, now in {old}:\n  {lines}")
        self.directory.mkdir(parents=True, exist_ok=True)
        for part in self.directory.glob("*.part"):
            shutil.rmtree(part)
        self._write_run(finished=False)

    def finish(self) -> None:
        """Mark the run as finished: its checkpoints are kept until the next run starts, which does not resume from them."""
        if self.world.rank == 0:
            self._write_run(finished=True)

    def _write_run(self, *, finished: bool) -> None:
        _write_json(self.directory / "run.json", {"fingerprint": self.fingerprint, "finished": finished})

    def names(self) -> list[str]:
        """Names of the complete checkpoints, oldest first."""
        return sorted(p.name for p in self.directory.glob("step-*") if p.is_dir() and p.suffix != ".part")

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Write a checkpoint; all processes call this, each with its shards of ``tensors``.

        Args:
            state: everything else, as JSON values; ``state["score"]`` is the validation loss, or None.
        """
        # 1. Every process writes its tensors to the directory that the first one has made.
        final = self.directory / f"step-{step:08d}"
        part = final.with_name(final.name + ".part")
        if self.world.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.world.wait()
        writer = dcp.HuggingFaceStorageWriter(str(part), save_distributed=True)
        with _single_process():
            dcp.save(tensors, storage_writer=writer, no_dist=self.world.size == 1)
        if self.world.rank == 0:
            # 2. The first process adds state and checksums, and brings all of it to disk before the rename.
            _write_json(part / "state.json", state)
            _write_json(part / "checksums.json", {file.name: file_hash(file) for file in sorted(part.iterdir())})
            for file in part.iterdir():
                _sync(file)
            # 3. The rename makes it a checkpoint.
            if final.exists():
                shutil.rmtree(final)
            part.rename(final)
            _sync(self.directory)
            self._prune()
        self.world.wait()
        return final

    def _prune(self) -> None:
        names = self.names()
        scores = {name: (_read_json(self.directory / name / "state.json") or {}).get("score") for name in names}
        scored = {name: score for name, score in scores.items() if score is not None}
        kept = {*names[-self.keep :], *([min(scored, key=scored.__getitem__)] if scored else [])}
        for name in names:
            if name not in kept:
                self._remove(name)

    def _remove(self, name: str) -> None:
        (self.directory / name).rename(self.directory / f"{name}.part")  # if killed while removing, it is no complete checkpoint
        shutil.rmtree(self.directory / f"{name}.part")

    def state(self, name: str) -> dict[str, Any]:
        """The ``state`` of a checkpoint."""
        found: dict[str, Any] = json.loads((self.directory / name / "state.json").read_text())
        return found

    def verify(self, name: str) -> None:
        """Compare the files of a checkpoint with its checksums.

        Raises:
            CheckpointError: if a file is missing or has changed.
        """
        directory = self.directory / name
        try:
            checksums = json.loads((directory / "checksums.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory / 'checksums.json'} is missing or unreadable ({error})") from None
        for file, expected in checksums.items():
            if not (directory / file).is_file():
                raise CheckpointError(f"{directory / file} is missing")
            if file_hash(directory / file) != expected:
                raise CheckpointError(f"{directory / file} has changed: its checksum differs")

    def newest(self) -> str | None:
        """Name of the newest intact checkpoint, the same on every process; None if there is none. Warns of damaged ones that it skips."""
        found = None
        if self.world.rank == 0:
            for name in reversed(self.names()):
                try:
                    self.verify(name)
                except CheckpointError as error:
                    _warn(f"checkpoint {name} is not used: {error}; trying the one before")
                    continue
                found = name
                break
        return self.world.gather(found)[0]

    def load(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Fill ``tensors`` in place and return the state. The number of processes may differ from when it was saved.

        Raises:
            CheckpointError: if the checkpoint's tensors have other names or shapes.
        """
        reader = dcp.HuggingFaceStorageReader(str(self.directory / name))
        stored = {key: getattr(value, "size", None) for key, value in reader.read_metadata().state_dict_metadata.items()}
        wanted = {key: value.shape for key, value in tensors.items()}
        if stored != wanted:
            differing = sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise CheckpointError(f"{self.directory / name} is of another model: {', '.join(differing[:3])}{more} differ")
        with _single_process():
            dcp.load(tensors, storage_reader=reader, no_dist=self.world.size == 1)
        return self.state(name)


@contextmanager
def _single_process() -> Iterator[None]:
    """Suppress torch's warning that saving and loading without torch.distributed assumes a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _write_json(path: Path, value: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value) + "\n")
    _sync(part)
    part.replace(path)


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if the file is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _warn(message: str) -> None:
    print(f"WARNING: {message}", file=sys.stderr, flush=True)


def generator_states() -> dict[str, list[int]]:
    """The states of torch's random generators, as JSON values."""
    states = {"cpu": torch.get_rng_state().tolist()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().tolist()
    return states


def set_generator_states(states: Mapping[str, list[int]]) -> None:
    """Restore what :func:`generator_states` returned; a CUDA state is ignored on machines without a GPU."""
    torch.set_rng_state(torch.tensor(states["cpu"], dtype=torch.uint8))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))
