"""Checkpoints of a training run: complete, verified, and resumed from only by the run that wrote them, unless the user says otherwise.

A checkpoint is a directory ``step-00001000``: tensors as safetensors files, one for each process that wrote
(``torch.distributed.checkpoint``, so that any number of processes can read them), ``state.json`` with everything else, and
``checksums.json`` of both. It is written as ``step-00001000.part`` and renamed when complete, so a name without ``.part`` is a complete
checkpoint. A run's checkpoints lie in a directory of its own, named after its fingerprint: parameters, data and code
(``checkpoint_runs.py``). A run with another fingerprint neither resumes from them nor, unless the run has finished, removes them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from cm3leon.training.checkpoint_runs import Resumption, RunRecord, checkpoint_names, remove, run_directories, run_name
from cm3leon.training.fingerprint import Fingerprint, differences, file_hash
from cm3leon.utils.errors import UserError
from cm3leon.utils.files import sync, write_json
from cm3leon.utils.world import World


class CheckpointError(UserError):
    """A checkpoint is damaged or of another model; the message names the file and the reason."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run: the ``keep`` newest and the one with the lowest validation loss.

    Attributes:
        root: directory of the stage, which holds a directory for each run.
        adopting: the stage's command can resume from another run (:meth:`adopt`).
    """

    root: Path
    fingerprint: Fingerprint
    keep: int
    world: World = field(default_factory=World)
    adopting: bool = False

    @property
    def directory(self) -> Path:
        """That of this run."""
        return self.root / run_name(self.fingerprint)

    @property
    def record(self) -> RunRecord:
        """What ``run.json`` says of this run; a new record if it starts from the beginning."""
        found = RunRecord.read(self.directory)
        return replace(found, fingerprint=self.fingerprint, finished=False) if self.names() else RunRecord(self.fingerprint)

    def open(self) -> None:
        """Prepare the directory for saving and loading.

        Other runs that have finished lose their checkpoints; this one keeps them, as its model may have been lost since. Those of
        unfinished runs stay; where this run has none, standard error says how the newest of them differs, and with ``adopting`` how to
        resume from it.
        """
        if self.world.rank == 0:
            self._prepare()
        self.world.wait()

    def _prepare(self) -> None:
        record = self.record
        for directory in run_directories(self.root):
            if directory != self.directory and RunRecord.read(directory).finished:
                remove(directory)
        others = [run for run in run_directories(self.root) if run != self.directory and checkpoint_names(run)]
        if others and not self.names():
            lines = "\n  ".join(differences(RunRecord.read(others[0]).fingerprint, self.fingerprint))
            advice = f" To resume from them all the same, start with: --resume-from {others[0]} --accept-changes" if self.adopting else ""
            _warn(
                f"starting from the beginning: the newest checkpoints, in {others[0]}, are of a run that differs:\n  {lines}\n"
                f"They are kept.{advice}"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        for part in [*self.root.glob("*.part"), *self.directory.glob("*.part")]:
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        record.write(self.directory)

    def adopt(self, source: Path, accept_changes: bool, tensors: Mapping[str, Tensor]) -> None:
        """Take the newest intact checkpoint of another run as the first one of this run, which then resumes from it.

        Nothing is done if this was done before, so that an interrupted run may be started by the same command again.

        Args:
            source: a run's directory, or one of its checkpoints.
            accept_changes: resume although the runs differ.
            tensors: as for :meth:`load`; only their shapes are used.

        Raises:
            UserError: if ``source`` holds no intact checkpoint, the runs differ and that is not accepted, or this run has its own
                checkpoints.
            CheckpointError: if the checkpoint's tensors have other names or shapes.
        """
        if self.world.rank == 0:
            self._adopt(source, accept_changes, tensors)
        self.world.wait()

    def _adopt(self, source: Path, accept_changes: bool, tensors: Mapping[str, Tensor]) -> None:
        run = source.parent if source.name.startswith("step-") else source
        # 1. Checkpoints of this run are not given up for another's.
        if run.resolve() == self.directory.resolve():
            raise UserError(f"{run} is this run's own: it resumes without --resume-from")
        if self.names():
            resumed = self.record.resumed
            before = Path(resumed[-1]["checkpoint"]) if resumed else None
            if before and source.resolve() in (before.resolve(), before.parent.resolve()):
                return
            raise UserError(
                f"this run has checkpoints of its own in {self.directory}: start it without --resume-from to resume from "
                f"{self.names()[-1]}, or remove that directory first"
            )
        # 2. The checkpoint, and how its run differs.
        name = _newest_intact(run, [source.name] if run != source else checkpoint_names(run))
        if name is None:
            raise UserError(f"{source}: no intact checkpoint here; looked for {run}/step-*; runs are in {self.root}/*")
        theirs = RunRecord.read(run)
        changed = differences(theirs.fingerprint, self.fingerprint)
        lines = "".join(f"\n  {line}" for line in changed)
        if changed and not accept_changes:
            raise UserError(f"{run} is of a run that differs; to resume from it all the same, add --accept-changes:{lines}")
        _check_model(run / name, tensors)
        print(f"resuming from {run / name}, of a run that differs in {len(changed)} entries:{lines}", flush=True)
        # 3. Its files are never changed, so links to them do.
        if self.directory.exists():
            remove(self.directory)
        part = self.directory / f"{name}.part"
        shutil.copytree(run / name, part, copy_function=_link)
        resumption = Resumption(checkpoint=str(run / name), step=int(name.removeprefix("step-")), differences=changed)
        RunRecord(self.fingerprint, resumed=[*theirs.resumed, resumption]).write(self.directory)
        part.rename(self.directory / name)

    def finish(self) -> None:
        """Mark the run as finished: the next run with another fingerprint removes its checkpoints.

        Until then the same run resumes at its last checkpoint, the decoder's at its last step, and writes the same model again: what comes
        after training may fail, or lose it.
        """
        if self.world.rank == 0:
            replace(self.record, finished=True).write(self.directory)

    def names(self) -> list[str]:
        """Names of the complete checkpoints, oldest first."""
        return checkpoint_names(self.directory)

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
        with _torch_checkpoint():
            dcp.save(tensors, storage_writer=writer, no_dist=self.world.size == 1)
        if self.world.rank == 0:
            # 2. The first process adds state and checksums, and brings all of it to disk before the rename.
            write_json(part / "state.json", state)
            write_json(part / "checksums.json", {file.name: file_hash(file) for file in sorted(part.iterdir())})
            for file in part.iterdir():
                sync(file)
            # 3. The rename makes it a checkpoint.
            if final.exists():
                shutil.rmtree(final)
            part.rename(final)
            sync(self.directory)
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
                remove(self.directory / name)

    def state(self, name: str) -> dict[str, Any]:
        """The ``state`` of a checkpoint."""
        found: dict[str, Any] = json.loads((self.directory / name / "state.json").read_text())
        return found

    def newest(self) -> str | None:
        """Name of the newest intact checkpoint, the same on every process; None if there is none. Warns of damaged ones that it skips."""
        found = _newest_intact(self.directory, self.names()) if self.world.rank == 0 else None
        return self.world.gather(found)[0]

    def load(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Fill ``tensors`` in place and return the state. The number of processes may differ from when it was saved.

        Raises:
            CheckpointError: if the checkpoint's tensors have other names or shapes.
        """
        reader = _check_model(self.directory / name, tensors)
        with _torch_checkpoint():
            dcp.load(tensors, storage_reader=reader, no_dist=self.world.size == 1)
        return self.state(name)


def _newest_intact(directory: Path, names: list[str]) -> str | None:
    """The last of ``names`` whose checkpoint is intact; warns of others that it skips."""
    for name in reversed(names):
        try:
            verify(directory / name)
        except CheckpointError as error:
            _warn(f"checkpoint {name} is not used: {error}; trying the one before")
        else:
            return name
    return None


def verify(checkpoint: Path) -> None:
    """Compare the files of a checkpoint with its checksums.

    Raises:
        CheckpointError: if a file is missing or has changed.
    """
    try:
        checksums = json.loads((checkpoint / "checksums.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / 'checksums.json'} is missing or unreadable ({error})") from None
    for file, expected in checksums.items():
        if not (checkpoint / file).is_file():
            raise CheckpointError(f"{checkpoint / file} is missing")
        if file_hash(checkpoint / file) != expected:
            raise CheckpointError(f"{checkpoint / file} has changed: its checksum differs")


def _check_model(checkpoint: Path, tensors: Mapping[str, Tensor]) -> dcp.HuggingFaceStorageReader:
    """A reader of the checkpoint; raises :class:`CheckpointError` if its tensors have other names or shapes than ``tensors``."""
    reader = dcp.HuggingFaceStorageReader(str(checkpoint))
    stored = {key: getattr(value, "size", None) for key, value in reader.read_metadata().state_dict_metadata.items()}
    wanted = {key: value.shape for key, value in tensors.items()}
    if stored != wanted:
        differing = sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(f"{checkpoint} is of another model: {', '.join(differing[:3])}{more} differ")
    return reader


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, target)


@contextmanager
def _torch_checkpoint() -> Iterator[None]:
    """Around torch's saving and loading: no warning that without torch.distributed there is one process, and errors as they were raised.

    Torch wraps the errors of all processes, such as that of a full disk, in one that is no ``Exception``.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        try:
            yield
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise cause from None


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if the file is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


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
