"""Bring the ``dvc.lock`` and ``params.yaml`` of a registered version back, by which DVC finds its data and models."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from cm3leon.registry.bundle import PROJECT_FILES
from cm3leon.registry.registry import Version, all_versions, bundle_file, connect, find_version
from cm3leon.utils.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient


class CheckoutError(UserError):
    """The files of a version cannot be brought back; the message says why."""


def restore_lock(name: str, force: bool = False) -> Version:
    """Write ``dvc.lock`` and ``params.yaml`` as they were when a version was registered.

    Args:
        name: number of the version, or ``@ALIAS``.
        force: replace also files whose present content neither git nor the registry has.

    Raises:
        NotRegisteredError: if there is no such version.
        CheckoutError: if the version has no ``dvc.lock``, or a file would be lost.
    """
    client = connect()
    version = find_version(client, name)
    wanted = {path: _kept(client, version, path) for path in PROJECT_FILES}
    if absent := [str(path) for path, content in wanted.items() if content is None]:
        raise CheckoutError(f"version {version} was registered without {' and '.join(absent)}, so its data cannot be found")
    others = all_versions(client)
    lost = [
        str(path)
        for path, content in wanted.items()
        if path.exists() and path.read_bytes() != content and not _in_git(path) and not _in_registry(client, others, path)
    ]
    if lost and not force:
        raise CheckoutError(
            f"{' and '.join(lost)} would be replaced and is kept nowhere else; commit what you want to keep, or add --force"
        )
    for path, content in wanted.items():
        assert content is not None
        path.write_bytes(content)
    return version


def _kept(client: MlflowClient, version: Version, path: Path) -> bytes | None:
    """The project's file as the version keeps it; None if it does not."""
    try:
        return bundle_file(client, version.number, path.name)
    except FileNotFoundError:
        return None


def _in_git(path: Path) -> bool:
    """Whether the last commit has the file as it is."""
    commands = (["git", "ls-files", "--error-unmatch", str(path)], ["git", "diff", "--quiet", "HEAD", "--", str(path)])
    return all(subprocess.run(command, check=False, capture_output=True).returncode == 0 for command in commands)


def _in_registry(client: MlflowClient, versions: list[Version], path: Path) -> bool:
    """Whether a version keeps the file as it is."""
    content = path.read_bytes()
    return any(_kept(client, version, path) == content for version in versions)
