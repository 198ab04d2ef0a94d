"""The MLflow store: its address, its preparation, and the runs of processes that died.

Without ``MLFLOW_TRACKING_URI`` the store is the SQLite file ``mlflow.db`` in the project's root, with artifacts under ``mlruns``.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from cm3leon.tracking.sqlite import move_artifacts, sqlite_file, sqlite_uri
from cm3leon.utils import telemetry
from cm3leon.utils.errors import advice_about_disk
from cm3leon.utils.network import reach_local_servers
from cm3leon.utils.processes import has_ended

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "cm3leon"
STORE, ARTIFACTS = Path("mlflow.db"), Path("mlruns")
"""The project's own store, relative to its root, and its artifacts, beside it."""
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
    "PGCONNECT_TIMEOUT": "10",
}
"""Environment of every process that uses MLflow; variables that the user has set keep their values."""


class StoreError(ConnectionError):
    """The MLflow store cannot be used; the message says which, why, and what to do."""


def use_settings() -> None:
    """Set :data:`SETTINGS`, and let local servers be reached without a proxy; call before importing mlflow."""
    telemetry.turn_off()
    reach_local_servers()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    # MLflow logs a database error with its traceback and raises it too.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def warn(message: str) -> None:
    """Print a warning to standard error."""
    print(f"WARNING: {message}", file=sys.stderr, flush=True)


def tracking_uri(root: Path = Path()) -> str:
    """``MLFLOW_TRACKING_URI`` if set, else the SQLite file ``mlflow.db`` in the project's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(root / STORE)


def without_password(uri: str) -> str:
    """The URI as a message may show it."""
    return re.sub(r"(://[^/@:]*):.*@", r"\1:***@", uri)


def without_credentials(uri: str) -> str:
    """The address of a server without user and password: as a link may have it, and as urllib takes it."""
    return re.sub("://[^/@]*@", "://", uri)


def health_address(uri: str) -> str:
    """The address of a server that says whether it runs."""
    return without_credentials(uri.rstrip("/")) + "/health"


def prepare_store(root: Path = Path()) -> str:
    """Prepare the store and return its URI: migrate a SQLite file, create the experiment, end runs of dead processes.

    A new SQLite file that several processes open at once is corrupted for good, so the migration holds a file lock next to it.
    Idempotent; about 10 seconds for a new file, well under one for a current one (without the import of mlflow).

    Raises:
        StoreError: if the store does not answer, is damaged, cannot be written, or ``MLFLOW_TRACKING_URI`` names none; if the project's own
            is a copy of another project's.
    """
    use_settings()
    uri = tracking_uri(root)
    with explained(uri):
        if uri.startswith(("http://", "https://")):
            _check_server(uri)
        file = sqlite_file(uri)
        with _locked(file):
            if file:
                migrate(uri)
                if file.absolute() == (root / STORE).absolute():
                    _follow_project(file)
            elif "://" in uri and not uri.startswith("http"):
                _check_database(uri)
            from mlflow import MlflowClient

            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            _sweep(client, experiment_id_of(client, uri))
    return uri


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Raise errors of MLflow, SQLAlchemy, drivers and the file system as a :class:`StoreError` of one line."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        if not _is_of_store(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise StoreError(f"the MLflow store {without_password(uri)} cannot be used: {reason}; {_advice(uri, error)}") from None


def _is_of_store(error: Exception) -> bool:
    import sqlite3

    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, (MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, OSError, ImportError))


def _advice(uri: str, error: Exception) -> str:
    """What to do about an error of the store."""
    if isinstance(error, ImportError):
        return f"install the driver {error.name}, or change MLFLOW_TRACKING_URI"
    if advice := advice_about_disk(error):
        return advice
    if "Can't locate revision" in str(error):
        return "a newer MLflow has migrated it: install this project's version that did (make install), or restore a backup from before"
    if re.search("not a database|malformed", str(error)):
        return "move the damaged file away and put a backup in its place (*.bak beside it), or let the next run begin a new one"
    if uri.startswith("sqlite") and (isinstance(error, OSError) or "unable to open" in str(error)):
        return "make its directory writable, or set MLFLOW_TRACKING_URI to another store"
    return "start it, or correct or unset MLFLOW_TRACKING_URI"


def _locked(file: Path | None) -> AbstractContextManager[Any]:
    """A lock that lets one process at a time prepare a SQLite store; a server locks its own database."""
    if file is None:
        return nullcontext()
    from filelock import FileLock

    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{file}.lock", timeout=LOCK_SECONDS)


def migrate(uri: str) -> None:
    """``mlflow db upgrade`` of a SQLite file if its schema is not that of the installed MLflow; a backup of an older file is kept.

    A copy is migrated and then takes the file's place, so that the file stays as it was if that fails or is killed. Call it in one process
    at a time: see :func:`prepare_store`.
    """
    found = sqlite_file(uri)
    assert found is not None
    file = found.resolve()  # the copy takes the place of the file, not of a link to it
    current = schema_revision(file)  # before MLflow's import: a damaged file is noticed at once
    import sqlite3

    from mlflow.db import upgrade
    from mlflow.store.db.utils import _get_latest_schema_revision

    if current == _get_latest_schema_revision():
        return
    new = Path(f"{file}.new")
    new.unlink(missing_ok=True)
    if current is not None:
        with closing(sqlite3.connect(file, timeout=60)) as old, closing(sqlite3.connect(new)) as copy:
            old.backup(copy)
    print(f"preparing the MLflow store {file} (about 10 s, once)", file=sys.stderr, flush=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    assert upgrade.callback is not None
    upgrade.callback(sqlite_uri(new))
    if current is not None:
        part = Path(f"{file}.part")
        shutil.copyfile(file, part)
        part.replace(f"{file}.{current}.bak")
        shutil.copymode(file, new)
    new.replace(file)


def _follow_project(file: Path) -> None:
    """Correct the addresses of artifacts, which are absolute, after the project was moved with them. A place of the user's choice stays.

    Raises:
        StoreError: if the project was copied: what is logged here would go into the original.
    """
    import sqlite3

    new = (file.parent / ARTIFACTS).absolute()
    with closing(sqlite3.connect(file, timeout=60)) as connection, connection:
        places = dict(connection.execute("SELECT name, artifact_location FROM experiments"))
        known = places.get(EXPERIMENT, "")
        old = Path(unquote(urlsplit(known).path))
        if not known.startswith("file:") or old.name != new.name or old == new:
            return
        original = old.parent / file.name
        if (created := _created(original)) is not None and created == _created(file):
            if original.samefile(file):  # the project has two paths
                return
            raise StoreError(
                f"{file} is a copy of that in {old.parent}, and would put models into {old}: move {STORE} and {ARTIFACTS} of {new.parent} "
                "away, then bring a copy by cm3leon backup there and cm3leon restore here; or set MLFLOW_TRACKING_URI to that store"
            )
        uris = [uri for (uri,) in connection.execute("SELECT artifact_uri FROM runs") if uri.startswith(f"{known}/")]
        runs = [unquote(uri.removeprefix(f"{known}/")) for uri in uris]
        here, there = (any((place / run).exists() for run in runs) for place in (new, old))
        # Where there are no artifacts, the old place was the project's own, and no disk that is away, if MLflow has put its default
        # experiment, of which users choose nothing, below it.
        own = places.get("Default", "").startswith((f"{known}/", f"{old}/"))
        if not there and (here or own):
            move_artifacts(connection, known, new.as_uri())
            move_artifacts(connection, str(old), str(new))  # as MLflow writes that of the default experiment


def _created(file: Path) -> int | None:
    """When a SQLite store's experiment was created, ms since 1970, by which a copy is recognized; None if there is no such store."""
    import sqlite3

    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, timeout=60)) as connection:
            row = connection.execute("SELECT creation_time FROM experiments WHERE name = ?", (EXPERIMENT,)).fetchone()
    except sqlite3.DatabaseError:
        return None
    return row[0] if row else None


def schema_revision(path: Path) -> str | None:
    """The schema revision of a SQLite store; None if the file is missing or empty.

    Raises:
        StoreError: if the database is another program's.
        sqlite3.DatabaseError: if the file is damaged, or cannot be opened.
    """
    import sqlite3

    if not path.exists() or path.stat().st_size == 0:
        return None
    connection = sqlite3.connect(path, timeout=60)
    try:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and not tables >= {"alembic_version", "experiments"}:
            raise StoreError(f"{path} is a database, but not MLflow's: name another file in MLFLOW_TRACKING_URI, or move this one away")
        rows = connection.execute("SELECT version_num FROM alembic_version").fetchall() if tables else []
    finally:
        connection.close()
    return str(rows[0][0]) if rows else None


def _check_server(uri: str) -> None:
    """Fail at once if a server does not answer, for which MLflow's own client would retry for minutes. Any HTTP answer counts."""
    import urllib.error
    import urllib.request
    from http.client import HTTPException

    try:
        urllib.request.urlopen(health_address(uri), timeout=10).close()
    except urllib.error.HTTPError:
        return
    except (OSError, HTTPException, ValueError) as error:
        advice = "start it, or correct or unset MLFLOW_TRACKING_URI"
        raise StoreError(f"the MLflow server {without_password(uri)} does not answer ({error}); {advice}") from None


def _check_database(uri: str) -> None:
    """Connect once, for which MLflow's own client would try ten times in 103 s."""
    from sqlalchemy import create_engine

    engine = create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def experiment_id_of(client: MlflowClient, uri: str, name: str = EXPERIMENT) -> str:
    """The id of an experiment, created if it does not exist; a SQLite store has its artifacts in ``mlruns`` beside it."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        local = (file.parent / ARTIFACTS).absolute().as_uri() if (file := sqlite_file(uri)) else None
        try:
            return client.create_experiment(name, artifact_location=local)
        except MlflowException:  # another process has created it meanwhile
            found = client.get_experiment_by_name(name)
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
