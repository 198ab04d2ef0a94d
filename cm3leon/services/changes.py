"""``cm3leon data changed``: an event for Prefect when data differ from those that ``dvc.lock`` names, once for each content.

The event starts the deployment ``on-data-change`` of ``prefect.yaml``. A scheduler, a hook of git or a person may call the command at any
time: it asks DVC whether there is something to tell.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from cm3leon.config.loading import load_config
from cm3leon.services import events
from cm3leon.services.dvc_commands import changed_dependencies, locked_dependencies
from cm3leon.services.environment import git_problem, use_environment
from cm3leon.services.exclusive import alone_in_directory
from cm3leon.services.worktree import held
from cm3leon.tracking.lineage import DVC_LOCK, locked_md5
from cm3leon.tracking.store import without_password
from cm3leon.utils.errors import UserError

EVENT = "cm3leon.data.changed"
TOLD = Path(".cache/data-changed.json")
"""Data -> fingerprint of what the last event told of. ``dvc.lock`` alone does not know of a run that has failed on them."""


def tell_changed(path: Path | None = None, force: bool = False) -> str:
    """Send the event if data have changed and no event has told so yet; returns in a sentence what was done.

    Data that are as ``dvc.lock`` names them have changed too if the last event told of others, on which a run has worked since: in the
    worktree of the deployments, whose own lock names those.

    Args:
        path: what a stage depends on, or a file or folder in it; None: the source, ``ingest.path`` of ``params.yaml``.
        force: send it in any case.

    Raises:
        UserError: if no stage depends on ``path``, or it does not exist; if a run is at work, beside which another would be cancelled.
        ServerError: if there is no Prefect server, or it does not take the event.
        DvcError: if DVC cannot tell what has changed.
    """
    use_environment()
    server = events.server_address()
    locks = _locks_of_runs()
    changes = changed_dependencies()
    data = find_data(path, [*locked_dependencies(), *changes])
    change = changes.get(data, "unchanged")
    if change == "deleted":
        raise UserError(f"{data}, on which a stage depends, does not exist; bring it back, or set another ingest.path in params.yaml")
    told, now = _told(), fingerprint(Path(data))
    if not force and change == "unchanged" and (told.get(data) in (None, now) or not _other_data(data, locks)):
        return f"{data} is as dvc.lock names it; no event sent (--force sends one)"
    if not force and told.get(data) == now:
        return f"{data} is {change}, which an event has told already; no event sent (--force sends one)"
    resource = {"prefect.resource.id": f"cm3leon.data.{data}", "prefect.resource.name": data}
    events.emit(EVENT, resource, {"path": data, "change": change, "project": str(Path.cwd())})
    TOLD.write_text(json.dumps({**told, data: now}, indent=2) + "\n")
    return f"{data} is {change}: event {EVENT} sent to {without_password(server)}"


def find_data(path: Path | None, dependencies: Iterable[str]) -> str:
    """The dependency of a stage that is ``path`` or in which it lies; None: the source.

    Raises:
        UserError: if there is none.
    """
    source = load_config().ingest.path
    wanted = (path or Path(source)).resolve()
    known = {Path(name).resolve(): name for name in dependencies}
    for place in (wanted, *wanted.parents):
        if place in known:
            return known[place]
    raise UserError(f"no stage in dvc.yaml depends on {path or source}; the source is {source} (ingest.path in params.yaml)")


def fingerprint(path: Path) -> str:
    """A hash of the names, sizes and times of change of all files in ``path``, without reading them."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    stats = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _locks_of_runs() -> list[str]:
    """The ``dvc.lock`` of the deployments' worktree, if there is one.

    Raises:
        BusyError: if a run is at work where those of deployments work; one that an event started now would be cancelled.
    """
    if git_problem():
        with alone_in_directory():
            return []
    with held(Path()) as locks:
        return locks


def _other_data(data: str, locks: Iterable[str]) -> bool:
    """Whether one of ``locks`` names another content of ``data`` than the project's ``dvc.lock``."""
    own, *others = (locked_md5(lock.encode(), os.path.normpath(data)) for lock in (DVC_LOCK.read_text(), *locks))
    return any(other not in (None, own) for other in others)


def _told() -> dict[str, str]:
    try:
        return dict(json.loads(TOLD.read_text()))
    except (OSError, ValueError):  # none yet, or cut off by a killed process: then the event is sent once more
        return {}
