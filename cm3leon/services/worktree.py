"""The git worktree in which the pipeline's deployments run, so that a run never touches the files that a person edits.

    python -m cm3leon.services.worktree     # in the project's root; prints the worktree's path

Every run of these deployments begins with this command (``prefect.yaml``). The worktree has the last commit, and keeps the outputs and
checkpoints of the run before. It shares with the project what is not in git: DVC's cache, the MLflow store, the address of the servers, and
the collection that ``ingest.path`` names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from cm3leon.config.paths import EXCLUDED
from cm3leon.services import dvc_commands
from cm3leon.services.environment import git_problem
from cm3leon.services.exclusive import BusyError, alone_in_directory
from cm3leon.tracking.lineage import DVC_LOCK
from cm3leon.tracking.store import warn
from cm3leon.utils.errors import UserError

WORKTREE = Path(".cache/worktree")
"""Relative to the project's root."""
SHARED = (Path(".prefect"), Path(".services"))
"""Where the servers keep their addresses; links in the worktree."""


PREFIX, RESULTS = "run-", 20
"""Of the names of the experiments that hold the results of runs, and how many are kept."""


class WorktreeError(UserError):
    """There can be no worktree; the message says why and what to do."""


def project_of(tree: Path) -> Path | None:
    """The project's root if ``tree`` is the worktree of its deployments, else None."""
    return tree.parents[len(WORKTREE.parts) - 1] if tree.parts[-len(WORKTREE.parts) :] == WORKTREE.parts else None


def prepare(root: Path) -> Path:
    """Bring the worktree of a project to the last commit, and return it. While a run works there it is left as it is.

    Where there is no git, runs work in the project: its root is returned.

    Raises:
        WorktreeError: if the project has no commit, its collection is named by a relative path out of it, or the worktree is damaged for
            the second time.
        cm3leon.utils.errors.ConfigError: if the commit's ``params.yaml`` is invalid.
    """
    if problem := git_problem(root):
        warn(f"{problem}: this run works in the project itself, and a profile replaces its params.yaml")
        return root
    tree = root / WORKTREE
    new = _make(root, tree)
    try:
        with alone_in_directory(tree):
            _unhide_collection(tree)
            own = None if new else _Lock.read(tree / DVC_LOCK)  # where git has one too, the checkout replaces it
            _git(tree, "checkout", "--quiet", "--force", "--detach", _git(root, "rev-parse", "HEAD"))
            _share(root, tree)
            _link_collection(root, tree)
            _link_named_files(root, tree)
            _take_over(root, tree, own)
    except BusyError:  # the flow says so itself, and ends as cancelled
        pass
    return tree


def _make(root: Path, tree: Path) -> bool:
    """Make the worktree if there is none, or only a plain directory, in which git's commands would reach the project; True if it is new."""
    if tree.exists() and not _is_worktree(root, tree):
        _reconnect(root, tree)
    if tree.exists() and not _is_worktree(root, tree):
        aside = tree.with_name(f"{tree.name}.damaged")
        if aside.exists():
            raise WorktreeError(f"{tree} is no git worktree, and {aside} is one that was put aside before: remove what is not needed")
        tree.rename(aside)
        warn(f"{tree} was no git worktree; it is {aside} now, and a new one is made")
    if tree.exists():
        return False
    _git(root, "worktree", "prune")
    _git(root, "worktree", "add", "--quiet", "--detach", str(tree), "HEAD")
    return True


def _is_worktree(root: Path, tree: Path) -> bool:
    """Whether a directory is a worktree of the project's own repository, and not of one that is at the project's former path now."""
    command = ["git", "rev-parse", "--show-toplevel", "--git-common-dir"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return False
    top, repository = done.stdout.splitlines()
    return Path(top) == tree.resolve() and (tree / repository).resolve() == _repository(root)


def _repository(root: Path) -> Path:
    return (root / _git(root, "rev-parse", "--git-common-dir")).resolve()


def _reconnect(root: Path, tree: Path) -> None:
    """Connect a worktree with its repository after the project was moved; ``git worktree repair`` would change a clone at its old path."""
    file = tree / ".git"
    if not file.is_file() or not (name := Path(file.read_text().strip()).name):
        return
    record = _repository(root) / "worktrees" / name
    if record.is_dir():
        (record / "gitdir").write_text(f"{file.absolute()}\n")
        file.write_text(f"gitdir: {record}\n")


def _git(directory: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"git {arguments[0]} failed"]
        reason = next((line for line in lines if line.startswith(("fatal: ", "error: "))), lines[-1])
        if not _has_commit(directory):
            reason += "; runs of deployments take the project's last commit, so it must be in git: git commit"
        raise WorktreeError(f"{directory}: {reason}")
    return done.stdout.strip()


def _has_commit(directory: Path) -> bool:
    """Whether something is checked out; True where there is no repository."""
    command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    return subprocess.run(command, cwd=directory, capture_output=True, check=False).returncode != 1


def _link(link: Path, target: Path) -> None:
    """Make a symbolic link, in place of one that leads elsewhere: the project may have been moved since."""
    if link.is_symlink() and link.readlink() != target:
        link.unlink()
    if not link.is_symlink():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)


def _share(root: Path, tree: Path) -> None:
    """Links to the servers' addresses, and DVC's local settings with the project's cache."""
    for name in SHARED:
        _link(tree / name, root / name)
    local = Path(".dvc/config.local")
    if (root / local).is_file():
        shutil.copy(root / local, tree / local)
    dvc_commands.share_cache(tree, root)


def _link_collection(root: Path, tree: Path) -> None:
    """Link the collection if some of it is not in git. Files of it that are, such as a README, are hidden from git in the worktree."""
    from cm3leon.config.loading import load_config

    place = Path(load_config(tree / "params.yaml").ingest.path)
    if place.is_absolute() or not (root / place).exists():
        return
    if Path(os.path.normpath(place)).parts[:1] == ("..",):
        raise WorktreeError(
            f"ingest.path {place} leads out of the project, and elsewhere from its worktree {tree}, where runs of deployments work: "
            f"name the collection by its absolute path in params.yaml, {os.path.normpath(root / place)}, and commit it"
        )
    if not _git(root, "status", "--porcelain", "--ignored", "--", str(place)):
        return
    link = tree / place
    for parent in link.parents:
        if tree in parent.parents and parent.is_symlink():  # of another collection, which is not to be reached through it
            parent.unlink()
    if tracked := _git(tree, "ls-files", "-z", "--", str(place)):
        _git(tree, "update-index", "--skip-worktree", *filter(None, tracked.split("\0")))
    if not link.is_symlink():
        shutil.rmtree(link, ignore_errors=True)
    _link(link, root / place)


def _link_named_files(root: Path, tree: Path) -> None:
    """Link what parameters name and git does not have, such as weights, and what must not be trained on."""
    from cm3leon.config.files import named_files
    from cm3leon.config.loading import load_config

    for link in (tree / EXCLUDED).rglob("*"):
        if link.is_symlink() and not link.exists():  # removed from the project since
            link.unlink()
    excluded = [file.relative_to(root).as_posix() for file in (root / EXCLUDED).rglob("*") if file.is_file()]
    for name in (*named_files(load_config(tree / "params.yaml")).values(), *excluded):
        if (root / name).exists() and (not (tree / name).exists() or _is_own_link(tree, name)):
            _link(tree / name, root / name)


def _is_own_link(tree: Path, name: str) -> bool:
    """Whether ``name`` is a link that was made in the worktree: neither git's, nor reached through a link into the project."""
    link = tree / name
    return link.is_symlink() and link.readlink().is_absolute() and link.parent.resolve().is_relative_to(tree.resolve())


def _unhide_collection(tree: Path) -> None:
    """Undo what :func:`_link_collection` did to files in git: the next commit may have changed them."""
    hidden = [line[2:] for line in _git(tree, "ls-files", "-v", "-z").split("\0") if line.startswith("S ")]
    if hidden:
        _git(tree, "update-index", "--no-skip-worktree", *hidden)
    for link in {tree / parent for file in hidden for parent in Path(file).parents if (tree / parent).is_symlink()}:
        link.unlink()


class _Lock(NamedTuple):
    """A ``dvc.lock``, and when it was written."""

    content: bytes
    written: float

    @classmethod
    def read(cls, file: Path) -> _Lock | None:
        return cls(file.read_bytes(), file.stat().st_mtime) if file.is_file() else None


def _take_over(root: Path, tree: Path, own: _Lock | None) -> None:
    """Take over the project's outputs if a run in it is newer than the last one here, for runs that begin at a later stage.

    Args:
        own: that of the last run here, whose outputs are in the worktree.
    """
    project = _Lock.read(root / DVC_LOCK)
    if own is not None and (project is None or own.written >= project.written):
        (tree / DVC_LOCK).write_bytes(own.content)
        os.utime(tree / DVC_LOCK, (own.written, own.written))
        return
    if project is None:
        return
    shutil.copy2(root / DVC_LOCK, tree / DVC_LOCK)
    try:
        dvc_commands.restore(tree)
    except dvc_commands.DvcError as error:  # stages whose outputs are lost run again
        warn(str(error))


@contextmanager
def held(root: Path) -> Iterator[list[str]]:
    """The ``dvc.lock`` of the worktree, if there is one, while no run can work there.

    Raises:
        BusyError: if one works there.
    """
    tree = root / WORKTREE
    if not tree.exists():
        yield []
        return
    with alone_in_directory(tree):
        yield [(tree / DVC_LOCK).read_text()] if (tree / DVC_LOCK).is_file() else []


def save_results(flow_run: str) -> str:
    """Save what a run in the worktree has changed as an experiment of DVC, and return its name; older ones go after :data:`RESULTS`.

    Args:
        flow_run: name and id of the flow run.

    Raises:
        DvcError: if DVC cannot save it.
    """
    name = f"{PREFIX}{re.sub('[^0-9A-Za-z]+', '-', flow_run)}"
    dvc_commands.save_experiment(name)
    tree = Path()
    known = _git(tree, "for-each-ref", "--sort=-creatordate", "--format=%(refname)", f"refs/exps/*/*/{PREFIX}*")
    for ref in known.splitlines()[RESULTS:]:
        _git(tree, "update-ref", "-d", ref)
    return name


def main() -> int:
    """Prepare the worktree of the project in the working directory; returns the exit status."""
    try:
        print(prepare(Path.cwd()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
