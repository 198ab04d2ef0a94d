"""The MLflow store: its address, its preparation, and the runs of processes that died.

Without ``MLFLOW_TRACKING_URI`` the store is the SQLite file ``mlflow.db`` in the project's root, with artifacts under ``mlruns``.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cm3leon.utils import telemetry
from cm3leon.utils.network import reach_local_servers
from cm3leon.utils.processes import has_ended

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "cm3leon"
SQLITE = "sqlite:///"
LOCK_SECONDS = 300
"""How long to wait for another process that prepares the store."""
PROCESS_TAG = "process"
"""Tag with the identity of a run's process, by which a run left RUNNING by a dead process is recognized."""

SETTINGS = {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
"""Environment of every process that uses MLflow; variables that the user has set keep their values."""


def use_settings() -> None:
    """Set :data:`SETTINGS`, and let local servers be reached without a proxy; call before importing mlflow."""
    telemetry.turn_off()
    reach_local_servers()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def warn(message: str) -> None:
    """Print a warning to standard error."""
    print(f"WARNING: {message}", file=sys.stderr, flush=True)


def tracking_uri(root: Path = Path()) -> str:
    """``MLFLOW_TRACKING_URI`` if set, else the SQLite file ``mlflow.db`` in the project's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(root / 'mlflow.db').absolute()}"


def prepare_store(root: Path = Path()) -> str:
    """Prepare the store and return its URI: migrate a SQLite file, create the experiment, end runs of dead processes.

    A new SQLite file that several processes open at once is corrupted for good, so the migration holds a file lock next to it.
    Idempotent; about 10 seconds for a new file, well under one for a current one (without the import of mlflow).

    Raises:
        ConnectionError: if ``MLFLOW_TRACKING_URI`` names a server that does not answer.
    """
    use_settings()
    uri = tracking_uri(root)
    if uri.startswith(("http://", "https://")):
        _check_server(uri)
    with _locked(uri):
        from mlflow import MlflowClient

        if uri.startswith(SQLITE):
            migrate(uri)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        _sweep(client, experiment_id_of(client, root, uri))
    return uri


def _locked(uri: str) -> AbstractContextManager[Any]:
    """A lock that lets one process at a time prepare a SQLite store; a server locks its own database."""
    if not uri.startswith(SQLITE):
        return nullcontext()
    from filelock import FileLock

    path = Path(uri.removeprefix(SQLITE))
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock", timeout=LOCK_SECONDS)


def migrate(uri: str) -> None:
    """``mlflow db upgrade`` of a SQLite file if its schema is not that of the installed MLflow; a backup of an older file is kept.

    Call it in one process at a time: see :func:`prepare_store`.
    """
    import logging

    from mlflow.db import upgrade
    from mlflow.store.db.utils import _get_latest_schema_revision

    path = Path(uri.removeprefix(SQLITE))
    current = schema_revision(path)
    if current == _get_latest_schema_revision():
        return
    if current is not None:
        shutil.copyfile(path, f"{path}.{current}.bak")
    print(f"preparing the MLflow store {path} (about 10 s, once)", file=sys.stderr, flush=True)
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    assert upgrade.callback is not None
    upgrade.callback(uri)


def schema_revision(path: Path) -> str | None:
    """The schema revision of a SQLite store; None if the file is missing, empty or no store."""
    import sqlite3

    if not path.exists() or path.stat().st_size == 0:
        return None
    connection = sqlite3.connect(path, timeout=60)
    try:
        rows = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    except sqlite3.OperationalError:
        return None
    finally:
        connection.close()
    return str(rows[0][0]) if rows else None


def _check_server(uri: str) -> None:
    """Fail at once if a server does not answer, for which MLflow's own client would retry for minutes. Any HTTP answer counts."""
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10).close()
    except urllib.error.HTTPError:
        return
    except OSError as error:
        raise ConnectionError(f"the MLflow server {uri} does not answer ({error}); start it, or change MLFLOW_TRACKING_URI") from None


def experiment_id_of(client: MlflowClient, root: Path, uri: str) -> str:
    """The id of the experiment, created if it does not exist; a local store has its artifacts under ``ROOT/mlruns``."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        local = (root / "mlruns").absolute().as_uri() if uri.startswith(SQLITE) else None
        try:
            return client.create_experiment(EXPERIMENT, artifact_location=local)
        except MlflowException:  # another process has created it meanwhile
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def _sweep(client: MlflowClient, experiment_id: str) -> None:
    """End as KILLED the runs that processes of this host left RUNNING when they died."""
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=1000):
        if has_ended(run.data.tags.get(PROCESS_TAG, "")):
            client.set_terminated(run.info.run_id, status="KILLED")
