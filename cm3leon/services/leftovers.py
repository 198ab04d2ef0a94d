"""What a killed run leaves behind, so that the next run ends it.

Each process and each flow run that a run owns has a file ``.prefect/owned/KIND/NAME`` until it ends, which holds the identity of the owner.
If the owner has ended and the file is still there, nothing takes care of what it names any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cm3leon.services.environment import PREFECT_HOME
from cm3leon.utils.processes import has_ended, identity, pid_of, stop_tree

OWNED = PREFECT_HOME / "owned"
PROCESSES, SERVICES, FLOW_RUNS = "processes", "services", "flow_runs"
"""Kinds. Services are those of ``cm3leon up``, which its next call or ``down`` ends, and not the next run: it may be their worker's."""


@contextmanager
def owned(kind: str, name: str) -> Iterator[None]:
    """Record that this process takes care of something until the block ends.

    Args:
        kind: :data:`PROCESSES`, :data:`SERVICES` or :data:`FLOW_RUNS`.
        name: the identity of a process, or the id of a flow run.
    """
    record = write_record(kind, name, identity())
    try:
        yield
    finally:
        record.unlink(missing_ok=True)


def write_record(kind: str, name: str, owner: str) -> Path:
    """Record that the process with the identity ``owner`` takes care of something; returns the file, which is to go when that ends."""
    record = (OWNED / kind / name).absolute()
    PREFECT_HOME.mkdir(mode=0o700, exist_ok=True)  # as Prefect makes it, if it is first: the secrets in its database are the owner's alone
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(owner)
    return record


def abandoned(kind: str) -> Iterator[str]:
    """Names of what dead owners have left. A name is forgotten once the next one is asked for."""
    for record in sorted((OWNED / kind).glob("*")):
        with suppress(FileNotFoundError):  # its owner lives, and has just ended
            if has_ended(record.read_text()):
                yield record.name
                record.unlink()


def end_leftover_processes(kind: str = PROCESSES) -> list[int]:
    """End the processes of a kind, with their descendants, that dead owners have left; returns their ids."""
    ended = []
    for process in abandoned(kind):
        if not has_ended(process):
            stop_tree(pid_of(process))
            ended.append(pid_of(process))
    return ended
