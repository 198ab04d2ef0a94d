"""``cm3leon backup DIR`` and ``cm3leon restore DIR``: what no run makes again, in a directory with the project's own paths.

    mlflow.db, mlruns/                         MLflow's runs, the registry and the ledger, with their artifacts
    .prefect/prefect.db                        Prefect's runs, schedules, and promotions that wait for a decision
    .services/secrets.json                     the password of ``cm3leon up``
    .dvc/config.local, dvc.lock, params.yaml   DVC's remotes with their credentials, versions of the outputs, parameters
    backup.json                                where the project was

A backup can be made at any time. Not in it are outputs of the stages (``cm3leon data push``), the source, and databases that are no files.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from cm3leon.config import paths
from cm3leon.services.environment import DATABASE_VARIABLES, DVC_LOCAL, PREFECT_HOME, ProjectError
from cm3leon.services.stack import HOME, MLFLOW_DATABASE, PREFECT_DATABASE, SECRETS, read_state
from cm3leon.tracking.lineage import DVC_LOCK, git_commit
from cm3leon.tracking.sqlite import move_artifacts
from cm3leon.utils.errors import UserError

DATABASES = (Path("mlflow.db"), PREFECT_HOME / "prefect.db")
ARTIFACTS = Path("mlruns")
FILES = (SECRETS, DVC_LOCAL, DVC_LOCK, paths.PARAMS)
DESCRIPTION = "backup.json"


class BackupError(UserError):
    """There is nothing to back up or to restore, or something would be replaced; the message says what to do."""


def backup(target: Path) -> Iterator[Path]:
    """Copy what no run makes again into a new directory that only its owner can read; yields the paths, each after it is copied.

    Databases are copied by SQLite, so that a copy is consistent while others write, and before the artifacts, so that none is missing.
    ``target`` appears once all is copied.

    Raises:
        BackupError: if ``target`` exists, the project has no store, or a database is damaged.
    """
    if target.exists():
        raise BackupError(f"{target} exists; name a new directory")
    if not any(path.exists() for path in (*DATABASES, SECRETS)):
        raise BackupError(f"there is nothing to back up in {Path.cwd()}: no {DATABASES[0]}; run the command in the project's root")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for path in filter(Path.is_file, DATABASES):
            _make_folder(path, Path(), draft)
            _copy_database(path, draft / path)
            yield path
        yield from _copy((*FILES, ARTIFACTS), Path(), draft)
        (draft / DESCRIPTION).write_text(json.dumps({"project": str(Path.cwd())}) + "\n")
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def restore(source: Path) -> Iterator[Path]:
    """Copy a backup into the project in the working directory, which may be another; yields the paths, each after it is copied.

    Artifacts' addresses become those of this project, and runs that were at work are marked as killed. Schedules are off, and runs that had
    not begun are gone: the worker would start those whose time has come, in the original project.

    Raises:
        BackupError: if ``source`` is no backup, or something would be replaced that is kept nowhere else.
        ProjectError: if the directory is not the project's root.
    """
    try:
        moved_from = Path(json.loads((source / DESCRIPTION).read_text())["project"])
    except (OSError, ValueError, KeyError, TypeError):
        raise BackupError(f"{source} is no backup: it has no {DESCRIPTION}; make one by: cm3leon backup DIR") from None
    if not Path("dvc.yaml").is_file():
        raise ProjectError(f"{Path.cwd()} has no dvc.yaml; run the command in the project's root")
    present = [str(path) for path in (*DATABASES, ARTIFACTS, HOME) if path.exists()]
    present += [str(path) for path in (DVC_LOCAL, DVC_LOCK, paths.PARAMS) if _would_be_lost(path, source / path)]
    if present:
        raise BackupError(f"{', '.join(present)} would be replaced; restore into a fresh clone, or stop the services and move these away")
    yield from _copy((*DATABASES, *FILES, ARTIFACTS), source, Path())
    if DATABASES[0].is_file():
        _move_store(DATABASES[0], moved_from)
    if DATABASES[1].is_file():
        _unschedule(DATABASES[1])


def databases_elsewhere() -> list[str]:
    """The variables that name databases and servers of MLflow and Prefect outside the project, also for the services that are up."""
    known = {"MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME", MLFLOW_DATABASE, PREFECT_DATABASE, *DATABASE_VARIABLES}
    names = known & os.environ.keys()
    if state := read_state():
        names |= {MLFLOW_DATABASE} if state.mlflow_database else set()
        names |= {PREFECT_DATABASE} if state.prefect_database else set()
    return sorted(names)


def _copy_database(source: Path, target: Path) -> None:
    """Copy a SQLite file by SQLite's backup API: what other processes write meanwhile is in the copy as a whole, or not at all."""
    try:
        with closing(sqlite3.connect(source, timeout=60)) as original, closing(sqlite3.connect(target)) as copy:
            original.backup(copy)
    except sqlite3.DatabaseError as error:
        raise BackupError(f"{source} cannot be copied: {error}") from None


def _copy(paths: Sequence[Path], source: Path, target: Path) -> Iterator[Path]:
    """Copy those files and directories that there are, with their modes and times; yields each after it is copied."""
    for path in (path for path in paths if (source / path).exists()):
        for file in (found.relative_to(source) for found in (source / path, *(source / path).rglob("*")) if found.is_file()):
            _make_folder(file, source, target)
            (target / file).touch(mode=0o600)  # nobody else reads a secret before it has its mode
            shutil.copy2(source / file, target / file)
        yield path


def _make_folder(file: Path, source: Path, target: Path) -> None:
    """Make the folders of a file below ``target``, each with the mode that it has below ``source``; Prefect's is its owner's alone."""
    for folder in reversed(file.parents[:-1]):
        if not (target / folder).exists():
            (target / folder).mkdir(mode=0o700)
            shutil.copymode(source / folder, target / folder)
        if folder == PREFECT_HOME:
            (target / folder).chmod(0o700)


def _would_be_lost(path: Path, replacement: Path) -> bool:
    """Whether a file would be replaced whose content is neither in the backup nor in the last commit; an archive brings parameters too."""
    if not path.exists() or not replacement.exists() or path.read_bytes() == replacement.read_bytes():
        return False
    if git_commit() is None:
        return path != paths.PARAMS
    asked = subprocess.run(["git", "status", "--porcelain", "--ignored", "--", str(path)], capture_output=True, text=True, check=False)
    return bool(asked.stdout)


def _move_store(database: Path, moved_from: Path) -> None:
    """Change a copy of ``mlflow.db`` so that it holds for this project and for now."""
    old, new = ((root / ARTIFACTS).as_uri() for root in (moved_from, Path.cwd()))
    with closing(sqlite3.connect(database)) as connection, connection:
        move_artifacts(connection, old, new)
        connection.execute("UPDATE runs SET status = 'KILLED', end_time = ? WHERE status = 'RUNNING'", (time.time_ns() // 10**6,))


def _unschedule(database: Path) -> None:
    """Switch off the schedules in a copy of Prefect's database, and delete the runs that have not begun."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("PRAGMA foreign_keys = ON")  # a run's states go with it
        connection.execute("UPDATE deployment_schedule SET active = 0")
        connection.execute("DELETE FROM flow_run WHERE state_type = 'SCHEDULED' AND start_time IS NULL")
