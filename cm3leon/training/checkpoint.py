"""Checkpoints of a training run: whole, verified, and only ever continued by the run that wrote them.

A checkpoint is a directory ``step-00001000``: tensors as safetensors files, one for each process that wrote
(``torch.distributed.checkpoint``, so that any number of processes can read them), ``state.json`` with everything else, and
``checksums.json`` over both. It is written under another name and renamed when complete; a name without ``.part`` is a whole checkpoint.
The directory also holds the run's fingerprint: parameters, data and code. A run with another one never continues from it.
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
    """A checkpoint is damaged or of another run; the message says which file and why."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, in ``directory``: the ``keep`` newest and the best."""

    directory: Path
    fingerprint: Fingerprint
    keep: int
    world: World = field(default_factory=World)

    def open(self) -> None:
        """Make ready to save and load. What another run left, or a finished one, is put aside or removed, and standard error says so.

        Checkpoints of a run with another fingerprint are moved to ``DIRECTORY.old``, in place of what was there.
        """
        if self.world.rank == 0:
            self._prepare()
        self.world.wait()

    def _prepare(self) -> None:
        file = self.directory / "run.json"
        if file.is_file() and self.names():
            run = json.loads(file.read_text())
            changed = differences(run["fingerprint"], self.fingerprint)
            if run["finished"] and not changed:
                shutil.rmtree(self.directory)
            elif changed:
                aside = self.directory.with_name(self.directory.name + ".old")
                shutil.rmtree(aside, ignore_errors=True)
                self.directory.rename(aside)
                if not run["finished"]:
                    lines = "\n  ".join(changed)
                    _say(f"starting from the beginning: the checkpoints in {self.directory} are of another run, now in {aside}:\n  {lines}")
        self.directory.mkdir(parents=True, exist_ok=True)
        for part in self.directory.glob("*.part"):
            shutil.rmtree(part)
        self._write_run(finished=False)

    def finish(self) -> None:
        """Mark the run as finished: its checkpoints stay, and no run continues from them."""
        if self.world.rank == 0:
            self._write_run(finished=True)

    def _write_run(self, *, finished: bool) -> None:
        _write_json(self.directory / "run.json", {"fingerprint": self.fingerprint, "finished": finished})

    def names(self) -> list[str]:
        """The checkpoints, oldest first."""
        return sorted(p.name for p in self.directory.glob("step-*") if p.is_dir() and p.suffix != ".part")

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Write a checkpoint; every process calls it, with its shards of ``tensors``.

        Args:
            state: JSON; ``state["score"]``, if not None, is the validation loss by which the best is known.
        """
        final = self.directory / f"step-{step:08d}"
        part = final.with_name(final.name + ".part")
        if self.world.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.world.wait()
        writer = dcp.HuggingFaceStorageWriter(str(part), save_distributed=True)
        with _alone():
            dcp.save(tensors, storage_writer=writer, no_dist=self.world.size == 1)
        if self.world.rank == 0:
            _write_json(part / "state.json", state)
            _write_json(part / "checksums.json", {file.name: file_hash(file) for file in sorted(part.iterdir())})
            for file in part.iterdir():
                _sync(file)
            if final.exists():
                shutil.rmtree(final)
            part.rename(final)
            _sync(self.directory)
            self._prune()
        self.world.wait()
        return final

    def _prune(self) -> None:
        names = self.names()
        scores = {name: self.state(name).get("score") for name in names}
        scored = {name: score for name, score in scores.items() if score is not None}
        kept = {*names[-self.keep :], *([min(scored, key=scored.__getitem__)] if scored else [])}
        for name in names:
            if name not in kept:
                self._remove(name)

    def _remove(self, name: str) -> None:
        (self.directory / name).rename(self.directory / f"{name}.part")  # never half a checkpoint under a whole one's name
        shutil.rmtree(self.directory / f"{name}.part")

    def state(self, name: str) -> dict[str, Any]:
        """What :meth:`save` was given as ``state``."""
        found: dict[str, Any] = json.loads((self.directory / name / "state.json").read_text())
        return found

    def verify(self, name: str) -> None:
        """Check the files of a checkpoint against its checksums.

        Raises:
            CheckpointError: naming the file that is missing or not as it was written.
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
                raise CheckpointError(f"{directory / file} is not as it was written: its checksum differs")

    def newest(self) -> str | None:
        """The newest whole checkpoint, of which standard error is told what is damaged before it; the same on every process."""
        found = None
        if self.world.rank == 0:
            for name in reversed(self.names()):
                try:
                    self.verify(name)
                except CheckpointError as error:
                    _say(f"checkpoint {name} is not used: {error}; trying the one before")
                    continue
                found = name
                break
        return self.world.gather(found)[0]

    def load(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Fill ``tensors`` in place, whatever the number of processes that wrote them; returns the state.

        Raises:
            CheckpointError: if it does not hold exactly these tensors, in these shapes.
        """
        reader = dcp.HuggingFaceStorageReader(str(self.directory / name))
        stored = {key: getattr(value, "size", None) for key, value in reader.read_metadata().state_dict_metadata.items()}
        wanted = {key: value.shape for key, value in tensors.items()}
        if stored != wanted:
            odd = sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))
            raise CheckpointError(
                f"{self.directory / name} is of another model: {', '.join(odd[:3])} and {max(0, len(odd) - 3)} others differ"
            )
        with _alone():
            dcp.load(tensors, storage_reader=reader, no_dist=self.world.size == 1)
        return self.state(name)


@contextmanager
def _alone() -> Iterator[None]:
    """Without torch's warning that a single process saves and loads as one, which is what is wanted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _write_json(path: Path, value: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value) + "\n")
    _sync(part)
    part.replace(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _say(message: str) -> None:
    print(f"WARNING: {message}", file=sys.stderr, flush=True)


def generator_states() -> dict[str, list[int]]:
    """The states of torch's random generators, for JSON."""
    states = {"cpu": torch.get_rng_state().tolist()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().tolist()
    return states


def set_generator_states(states: Mapping[str, list[int]]) -> None:
    """Undo :func:`generator_states`, for the generators that are here."""
    torch.set_rng_state(torch.tensor(states["cpu"], dtype=torch.uint8))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))
