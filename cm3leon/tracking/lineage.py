"""Where an artifact came from: the git commit, the hashes that DVC recorded, and content hashes of directories."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

DVC_LOCK = Path("dvc.lock")


def content_hash(path: Path) -> str:
    """SHA-256 over the names and contents of a directory's files, first 16 hex digits.

    Sheets (PNG) and tables (CSV) do not count: no model depends on them.
    """
    found = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file() and file.suffix not in (".png", ".csv")):
        with file.open("rb") as stream:
            found.update(f"{file.relative_to(path)}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()[:16]


def _git(root: Path, *arguments: str) -> str | None:
    """The output of a git command in ``root``; None if it fails."""
    try:
        done = subprocess.run(["git", *arguments], check=False, cwd=root, capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


_COUNTED = ("--", ".", f":(exclude){DVC_LOCK}")
"""Which differences count: ``dvc.lock`` changes during a pipeline run and is recorded by its own md5."""


def git_commit(root: Path = Path()) -> str | None:
    """The commit that is checked out, with "-dirty" if tracked files other than ``dvc.lock`` differ from it; None outside a repository."""
    commit = (_git(root, "rev-parse", "--verify", "HEAD") or "").strip()
    if not commit:
        return None
    return f"{commit}-dirty" if changed_files(root) else commit


def changed_files(root: Path = Path()) -> list[str]:
    """Tracked files other than ``dvc.lock`` that differ from the commit, relative to ``root``."""
    return (_git(root, "diff", "--relative", "--name-only", "HEAD", *_COUNTED) or "").splitlines()


def git_diff(root: Path = Path()) -> str | None:
    """The differences of those files as a patch for ``git apply``; None or empty without any."""
    return _git(root, "diff", "--relative", "--binary", "HEAD", *_COUNTED)


def dvc_lock_md5(root: Path = Path()) -> str | None:
    """The md5 of ``dvc.lock``; None if it does not exist."""
    path = root / DVC_LOCK
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() if path.is_file() else None


def dvc_md5(path: str | Path) -> str | None:
    """The md5 in ``dvc.lock`` of an output or dependency of a stage; None if ``path`` is neither."""
    return locked_md5(DVC_LOCK.read_bytes(), os.path.relpath(path)) if DVC_LOCK.is_file() else None


def locked_md5(lock: bytes, wanted: str) -> str | None:
    """As :func:`dvc_md5`, of the content of a ``dvc.lock``.

    Args:
        wanted: the path, relative to the project.
    """
    import yaml

    stages: dict[str, Any] = (yaml.safe_load(lock) or {}).get("stages") or {}
    for kind in ("outs", "deps"):
        for stage in stages.values():
            for item in stage.get(kind) or []:
                if os.path.normpath(item["path"]) == wanted and "md5" in item:
                    return str(item["md5"])
    return None
