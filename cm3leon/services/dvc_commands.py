"""DVC's commands as child processes: what has changed, outputs of the stages to and from a remote, unused objects out of the cache.

The library does not import DVC (ARCHITECTURE.md). The remote is DVC's own setting: ``dvc remote add --default storage PATH``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from cm3leon.services.child import run_command
from cm3leon.services.disk import tree_size
from cm3leon.tracking.lineage import DVC_LOCK, git_commit
from cm3leon.utils.errors import UserError

NO_REMOTE = (
    "no default DVC remote is configured; add one: dvc remote add --default storage PLACE, where PLACE is a directory "
    "(/mnt/shared/cm3leon), ssh://user@host/path (pip install dvc-ssh) or s3://bucket/path (pip install dvc-s3)"
)
NO_LOCK = f"there is no {DVC_LOCK}, which names the outputs of the stages; run the pipeline, or: cm3leon data pull --version @champion"
MISSING = "md5: "
"""Beginning of the lines in which ``dvc push`` lists objects that it did not find; it then ends with status 0."""
REMOVING = "Removing "
"""Beginning of the lines in which ``dvc gc --dry`` lists objects."""
CHATTER = ("Having any troubles?", "WARNING: This will remove")


class DvcError(UserError):
    """A command of DVC failed, or has no remote or no lock to work with; the message says what to do."""


def _dvc(*arguments: str, on_line: Callable[[str], None] = lambda line: None, directory: Path = Path()) -> list[str]:
    """Run ``dvc ARGUMENTS`` in a directory; returns the last lines of its output.

    Raises:
        DvcError: if it fails, with what DVC says of it.
    """
    finished = run_command([sys.executable, "-m", "dvc", "--cd", str(directory), "--wait-for-lock", *arguments], on_line)
    if finished.status != 0:
        starts = [number for number, line in enumerate(finished.tail) if line.startswith("ERROR: ")]
        lines = [line for line in finished.tail[starts[0] if starts else 0 :] if line and not line.startswith(CHATTER)]
        raise DvcError(f"dvc {arguments[0]} failed: " + "\n".join(lines).removeprefix("ERROR: "))
    return finished.tail


def set_local(name: str, value: str | None) -> None:
    """Set a value of DVC's local configuration, which git does not keep, as ``core.no_scm``; None removes it.

    Raises:
        DvcError: if the configuration cannot be read.
    """
    _dvc("config", "--local", *(["--unset", name] if value is None else [name, value]))


def local_settings() -> dict[str, str]:
    """DVC's local configuration, as ``core.no_scm`` -> ``true``.

    Raises:
        DvcError: if the configuration cannot be read.
    """
    return _settings("--local")


def _settings(*options: str) -> dict[str, str]:
    found: dict[str, str] = {}
    _dvc("config", *options, "--list", on_line=lambda line: found.update([line.partition("=")[::2]]))
    return found


# --- changes ---------------------------------------------------------------------------------------------------------


def changed_dependencies() -> dict[str, str]:
    """What stages depend on and is not as ``dvc.lock`` names it: path -> ``modified``, ``new`` or ``deleted``.

    Raises:
        DvcError: if DVC fails, for instance on an invalid ``dvc.yaml``.
    """
    lines: list[str] = []
    _dvc("status", "--json", on_line=lines.append)
    status: dict[str, list[Any]] = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
    found = [change.get("changed deps", {}) for changes in status.values() for change in changes if isinstance(change, dict)]
    return {path: how for paths in found for path, how in paths.items() if isinstance(how, str)}  # parameters are a dict


def locked_dependencies() -> list[str]:
    """Paths on which a stage depends, as far as ``dvc.lock`` names them; none without that file."""
    stages: dict[str, Any] = (yaml.safe_load(DVC_LOCK.read_text()) or {}).get("stages") or {} if DVC_LOCK.is_file() else {}
    return [dependency["path"] for stage in stages.values() for dependency in stage.get("deps", [])]


# --- remote ----------------------------------------------------------------------------------------------------------


def find_remote(name: str | None = None) -> str:
    """The name of a configured remote; None: the default one.

    Raises:
        DvcError: if there is none.
    """
    settings = _settings()
    known = [key.removeprefix("remote.").removesuffix(".url") for key in settings if key.startswith("remote.") and key.endswith(".url")]
    found = name or settings.get("core.remote")
    if found is None:
        raise DvcError(NO_REMOTE)
    if found not in known:
        raise DvcError(f"DVC has no remote {found}; configured: {', '.join(known) or 'none'}; add it: dvc remote add {found} PLACE")
    return found


def push(remote: str, on_line: Callable[[str], None]) -> None:
    """Copy the outputs that ``dvc.lock`` names from DVC's cache to a remote.

    Args:
        on_line: gets DVC's lines.

    Raises:
        DvcError: if there is no ``dvc.lock``, the remote cannot be written, or the cache has lost some of the outputs.
    """
    _check_lock()
    missing = [line for line in _dvc("push", "--remote", remote, on_line=on_line) if line.startswith(MISSING)]
    if missing:
        raise DvcError(f"{len(missing)} objects or more that {DVC_LOCK} names are neither in DVC's cache nor on {remote}; run: dvc repro")


def pull(remote: str, on_line: Callable[[str], None], force: bool = False) -> None:
    """Bring the outputs that ``dvc.lock`` names from a remote into the cache and the working tree.

    Args:
        on_line: gets DVC's lines.
        force: replace outputs that were changed and are not in the cache.

    Raises:
        DvcError: if there is no ``dvc.lock``, the remote cannot be read or lacks outputs, or one would be lost.
    """
    _check_lock()
    _dvc("pull", "--remote", remote, *(["--force"] if force else []), on_line=on_line)


def _check_lock() -> None:
    if not DVC_LOCK.is_file():
        raise DvcError(NO_LOCK)


# --- another working tree --------------------------------------------------------------------------------------------


def share_cache(directory: Path, project: Path) -> None:
    """Let the working tree in ``directory`` use a project's cache, wherever that is; a local setting, which git does not keep."""
    lines: list[str] = []
    _dvc("cache", "dir", on_line=lines.append, directory=project)
    _dvc("cache", "dir", "--local", str((project / lines[-1]).absolute()), directory=directory)


def restore(directory: Path) -> None:
    """Bring the stages' outputs that ``dvc.lock`` names from the cache into a working tree, in place of what is there.

    The source, which DVC may version too, is left alone.

    Raises:
        DvcError: if the cache has lost some of them; the others are there.
    """
    _dvc("checkout", "--force", "dvc.yaml", directory=directory)


def save_experiment(name: str) -> None:
    """Keep ``params.yaml``, ``dvc.lock`` and other changes of the working tree as an experiment of DVC: a git ref, on no branch.

    Raises:
        DvcError: if there is one of that name.
    """
    _dvc("exp", "save", "--name", name, "--include-untracked", str(DVC_LOCK))


# --- cache -----------------------------------------------------------------------------------------------------------


def remove_unused(locks: Sequence[str], dry_run: bool) -> int:
    """Remove objects of DVC's cache that neither the working tree, nor a commit, nor one of ``locks`` names; returns their bytes.

    Args:
        locks: contents of further ``dvc.lock`` files.
        dry_run: remove nothing.

    Raises:
        DvcError: if DVC fails, for instance on a commit that it cannot read.
    """
    cache: list[Path] = []
    _dvc("cache", "dir", on_line=lambda line: cache.append(Path(line).absolute()))
    listed: list[Path] = []

    def read(line: str) -> None:
        if line.startswith(REMOVING):
            listed.append(Path(line.removeprefix(REMOVING)))

    before = tree_size(cache[0])
    history = ["--all-commits", "--all-experiments"] if git_commit() else []
    with ExitStack() as stack:
        projects = [_project_of(lock, cache[0], Path(stack.enter_context(tempfile.TemporaryDirectory()))) for lock in locks]
        named = ["--projects", *map(str, projects)] if projects else []
        _dvc("gc", "--workspace", *history, "--force", *(["--dry"] if dry_run else []), *named, on_line=read)
    return sum(map(tree_size, listed)) if dry_run else before - tree_size(cache[0])


def _project_of(lock: str, cache: Path, folder: Path) -> Path:
    """Make ``folder`` a project with the outputs of a lock, which ``dvc gc`` then keeps."""
    stages: dict[str, Any] = (yaml.safe_load(lock) or {}).get("stages") or {}
    outputs = {
        name: {"cmd": stage["cmd"], "outs": [out["path"] for out in stage["outs"]]} for name, stage in stages.items() if stage.get("outs")
    }
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)  # gc looks for commits of every project
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    (folder / ".dvc" / "cache").symlink_to(cache)  # a line of the configuration ends at a #
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": outputs}))
    (folder / "dvc.lock").write_text(lock)
    return folder
