"""Files that DVC rewrites in place, and that are empty or cut if it is killed meanwhile: it then refuses every command."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import yaml

from cm3leon.utils.errors import UserError

LOCK, COPY, RWLOCK = Path("dvc.lock"), Path(".dvc/tmp/dvc.lock"), Path(".dvc/tmp/rwlock")


def mend_files(root: Path) -> None:
    """Replace a damaged ``dvc.lock`` by the copy that the last run has made of it, and remove a damaged lock file of a killed process.

    Raises:
        UserError: if it has a conflict of git's.

    What stages did since that copy is in DVC's cache, from which they are restored. Call it while no other run is at work in ``root``.
    """
    lock, copy, rwlock = (root / path for path in (LOCK, COPY, RWLOCK))
    if lock.is_file():
        if is_lock(lock):
            copy.parent.mkdir(parents=True, exist_ok=True)
            part = copy.with_suffix(".part")
            shutil.copyfile(lock, part)
            part.replace(copy)
        elif b"<<<<<<<" in lock.read_bytes():
            raise UserError(f"{lock} has a conflict that git could not merge: resolve it, or take one side by: git checkout --ours {LOCK}")
        else:
            lock.replace(f"{lock}.damaged")
            if copy.is_file():
                shutil.copyfile(copy, lock)
            print(f"WARNING: {lock} was damaged, by a process that was killed; what it named is restored from the cache", file=sys.stderr)
    if rwlock.is_file() and not is_json(rwlock):
        rwlock.unlink()


def is_lock(path: Path) -> bool:
    """Whether DVC accepts a ``dvc.lock``."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    try:
        COMPILED_LOCKFILE_SCHEMA(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError, Invalid):
        return False
    return True


def is_json(path: Path) -> bool:
    """Whether a file holds JSON."""
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True
