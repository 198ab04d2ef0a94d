"""``cm3leon gc``: what no kept version needs is removed from the registry, from MLflow's store, from the checkpoints and from DVC's cache.

Kept are the newest versions, those with an alias, and every version that ever was the champion, each with its model, its run and the data
that its ``dvc.lock`` names. Entries of the ledger always stay. MLflow and DVC remove their own files: ``mlflow gc`` and ``dvc gc``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cm3leon.config import paths
from cm3leon.registry import ledger
from cm3leon.registry.bundle import LINEAGE
from cm3leon.registry.registry import MODEL_NAME, Version, all_versions, bundle_file, connect
from cm3leon.services import dvc_commands, worktree
from cm3leon.services.disk import tree_size
from cm3leon.tracking import store
from cm3leon.tracking.lineage import DVC_LOCK
from cm3leon.training.checkpoint_runs import remove, run_directories
from cm3leon.utils.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

KEEP = 5
"""Newest versions that are kept."""
KEEP_RUN_DAYS = 7
"""Checkpoints of a training run are kept for this long after the last one was written; those of each stage's last run longer."""
RUNS_AT_ONCE = 1000
"""Most runs that one call of ``mlflow gc`` names: the system bounds the length of an argument."""


class CleaningError(UserError):
    """Nothing is removed, because a kept version would be damaged."""


class Garbage(NamedTuple):
    """Something that is removed, in words, and its bytes on this disk."""

    what: str
    size: int


def clean(keep: int = KEEP, dry_run: bool = False) -> Iterator[Garbage]:
    """Remove what no kept version needs; yields it piece by piece, after it is removed.

    Args:
        keep: the number of newest versions to keep.
        dry_run: remove nothing.

    Raises:
        CleaningError: if the model or the run of a kept version is deleted in MLflow, which ``mlflow gc`` would make final, or the
            ``dvc.lock`` of one cannot be read.
        DvcError: if ``dvc gc`` fails.
        BusyError: if a run of a deployment is at work, whose objects no lock names yet.
    """
    if shutil.which("git") is None:
        raise CleaningError("git is not installed, which DVC needs to know what its cache has to keep; nothing was removed")
    with worktree.held(Path()) as running:
        client = connect()
        if client.get_experiment_by_name(ledger.EXPERIMENT):  # it says who was the champion; deleted, it would be empty
            store.experiment_id_of(client, client.tracking_uri, ledger.EXPERIMENT)
        versions = all_versions(client)
        kept = kept_versions(versions, ledger.read(client), keep)
        _check_intact(client, kept)
        locks = [lock for version in kept if (lock := _lock(client, version)) is not None]
        yield from _remove_from_mlflow(client, [version for version in versions if version not in kept], dry_run)
        for run in _old_runs():
            size = tree_size(run)
            if not dry_run:
                remove(run)
            yield Garbage(f"checkpoints {run}", size)
        if size := dvc_commands.remove_unused([*locks, *running], dry_run):
            yield Garbage("objects of DVC's cache", size)


def _old_runs() -> list[Path]:
    """Directories of the training runs whose checkpoints nobody has written or resumed for days, but for each stage's last run."""
    found = [run for stage in sorted(paths.CHECKPOINTS.glob("*")) for run in run_directories(stage)[1:]]
    return [run for run in found if time.time() - run.stat().st_mtime > KEEP_RUN_DAYS * 24 * 3600]


def kept_versions(versions: Sequence[Version], entries: Sequence[ledger.Entry], keep: int) -> list[Version]:
    """The newest versions, those with an alias, those that ever were the champion and those that wait for a decision.

    Args:
        versions: newest first.
        entries: of the ledger, newest first.
    """
    champions = {entry.champion for entry in entries} | {entry.version for entry in entries if entry.action in ("promote", "rollback")}
    waiting = ledger.waiting(entries)
    return [v for position, v in enumerate(versions) if position < keep or v.aliases or v.number in champions | waiting]


def _check_intact(client: MlflowClient, kept: Sequence[Version]) -> None:
    """Raises :class:`CleaningError` if a kept version's run or model is deleted in MLflow."""
    for version in kept:
        if version.run_id and client.get_run(version.run_id).info.lifecycle_stage == "deleted":
            raise CleaningError(
                f"the run of version {version}, which is kept, is deleted in MLflow; restore it by "
                f"mlflow runs restore --run-id {version.run_id}, or delete the version"
            )
        if _model(client, version) is None:
            raise CleaningError(f"the model of version {version}, which is kept, was deleted in MLflow; delete the version too")


def _lock(client: MlflowClient, version: Version) -> str | None:
    """The ``dvc.lock`` of a version; None if it was made without DVC."""
    try:
        return bundle_file(client, version.number, DVC_LOCK.name).decode()
    except FileNotFoundError:
        if json.loads(bundle_file(client, version.number, LINEAGE))["dvc_lock_md5"] is None:
            return None
    raise CleaningError(
        f"version {version} is kept, but was registered without its {DVC_LOCK}, so its objects in DVC's cache are not known; "
        "delete the version in MLflow, or clean the cache by hand: dvc gc"
    )


# --- MLflow ----------------------------------------------------------------------------------------------------------


def _remove_from_mlflow(client: MlflowClient, dropped: Sequence[Version], dry_run: bool) -> list[Garbage]:
    """Delete versions with their runs and models, and let ``mlflow gc`` remove all deleted runs of the store, but none of the ledger.

    A server's artifacts are not in reach: there the versions, runs and models are only marked as deleted.
    """
    if client.tracking_uri.startswith("http"):
        if not dry_run:
            _delete(client, dropped)
        return [Garbage(f"version {version}; its files go by mlflow gc on the server's host", 0) for version in dropped]
    runs = _deleted_runs(client)
    for version in dropped:
        runs.pop(version.run_id or "", None)
    garbage = [Garbage(f"version {version}", _size(client, version)) for version in dropped]
    garbage += [Garbage(f"deleted run {run_id}", _bytes(address)) for run_id, address in runs.items()]
    if dry_run or not garbage:
        return garbage
    models = _delete(client, dropped)
    _mlflow_gc(client, [*runs, *(version.run_id for version in dropped if version.run_id)], models)
    return garbage


def _delete(client: MlflowClient, versions: Sequence[Version]) -> list[str]:
    """Delete versions, and mark their runs and models as deleted; returns the models' ids."""
    models = []
    for version in versions:
        model = _model(client, version)
        client.delete_model_version(MODEL_NAME, version.number)
        if model:
            client.delete_logged_model(model.model_id)
            models.append(model.model_id)
        if version.run_id:
            client.delete_run(version.run_id)
    return models


def _deleted_runs(client: MlflowClient) -> dict[str, str]:
    """Runs of all experiments that are marked as deleted, except entries of the ledger: id and address of the artifacts."""
    from mlflow.entities import ViewType

    experiments = [e.experiment_id for e in client.search_experiments(ViewType.ALL) if e.name != ledger.EXPERIMENT]
    found: dict[str, str] = {}
    token = None
    while True:
        page = client.search_runs(experiments, run_view_type=ViewType.DELETED_ONLY, page_token=token)
        found |= {run.info.run_id: run.info.artifact_uri for run in page}
        token = page.token
        if not token:
            return found


def _mlflow_gc(client: MlflowClient, runs: Sequence[str], models: Sequence[str]) -> None:
    # Not by an option: the address may have a password, and lists of processes show options.
    environment = {**os.environ, "MLFLOW_TRACKING_URI": client.tracking_uri}
    while runs:
        command = [sys.executable, "-m", "mlflow", "gc", "--run-ids", ",".join(runs[:RUNS_AT_ONCE])]
        if models:
            command += ["--logged-model-ids", ",".join(models)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise CleaningError(f"mlflow gc failed: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")
        # The command removes all runs of deleted experiments besides, and refuses those that are gone.
        left = _deleted_runs(client)
        runs, models = [run for run in runs[RUNS_AT_ONCE:] if run in left], []


def _model(client: MlflowClient, version: Version) -> LoggedModel | None:
    """What MLflow has logged as the model of a version; None if it was deleted."""
    from mlflow.exceptions import MlflowException

    source = client.get_model_version(MODEL_NAME, version.number).source or ""
    try:
        return client.get_logged_model(source.removeprefix("models:/"))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _size(client: MlflowClient, version: Version) -> int:
    """Bytes of a version's model and of its run's artifacts."""
    model = _model(client, version)
    return (_bytes(model.artifact_location) if model else 0) + (
        _bytes(client.get_run(version.run_id).info.artifact_uri) if version.run_id else 0
    )


def _bytes(uri: str) -> int:
    """Bytes below an artifact location; 0 if it is not on this machine."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    return tree_size(Path(local_file_uri_to_path(uri))) if uri.startswith(("file:", "/")) else 0
