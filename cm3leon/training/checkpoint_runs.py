"""The runs of a training stage, whose checkpoints lie next to each other: ``ROOT/HASH12/step-00001000``.

A run's directory is named after its fingerprint, so that a changed parameter gives another directory, and changing it back the first one.
``run.json`` in it holds the fingerprint itself.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict

from cm3leon.training.fingerprint import Fingerprint
from cm3leon.utils.files import write_json

RECORD = "run.json"


class Resumption(TypedDict):
    """That a run was resumed from the checkpoint of another one: which, at which step, and how the two differ."""

    checkpoint: str
    step: int
    differences: list[str]


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run.

    Attributes:
        finished: its model was written; its checkpoints are no longer needed once another run starts.
        resumed: from which checkpoints of other runs, oldest first: also those that these runs were resumed from.
    """

    fingerprint: Fingerprint
    finished: bool = False
    resumed: list[Resumption] = field(default_factory=list)

    @classmethod
    def read(cls, directory: Path) -> RunRecord:
        """The record of a run; if it is missing or damaged, one of an unfinished run whose fingerprint says so."""
        try:
            return cls(**json.loads((directory / RECORD).read_text()))
        except (OSError, ValueError, TypeError):
            return cls({str(directory / RECORD): "damaged"})

    def write(self, directory: Path) -> None:
        write_json(directory / RECORD, asdict(self))


def run_name(fingerprint: Fingerprint) -> str:
    """The name of a run's directory: the first 12 hex digits of a hash of its fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]


def run_directories(root: Path) -> list[Path]:
    """The directories of all runs in ``root``, the one that was written to last first."""
    found = [record.parent for record in root.glob(f"*/{RECORD}") if record.parent.suffix != ".part"]
    return sorted(found, key=lambda directory: directory.stat().st_mtime, reverse=True)


def checkpoint_names(directory: Path) -> list[str]:
    """Names of the complete checkpoints of a run, oldest first."""
    return sorted(path.name for path in directory.glob("step-*") if path.is_dir() and path.suffix != ".part")


def remove(directory: Path) -> None:
    """Remove a checkpoint or a run; if this is interrupted, what is left has another name, with ``.part``."""
    part = directory.with_name(f"{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    directory.rename(part)
    shutil.rmtree(part)
