"""The model registry of a local SQLite store, read from its tables: importing MLflow takes longer than answering.

Only reading, of what MLflow's client would say; whatever is not as expected here is for MLflow to answer, so that every function may return
None. The tables are those of MLflow 3, and the file is opened read-only.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

SQLITE = "sqlite:///"
DELETED = "Deleted_Internal"
"""The stage of a deleted version, whose row MLflow keeps."""
WORKSPACE = "default"
_MORE = "SELECT {} FROM {} WHERE name = ? AND workspace = ? ORDER BY 2"


@dataclass
class LocalVersion:
    """A row of the registry, with the attributes of MLflow's own ``ModelVersion`` of the same names.

    Attributes:
        creation_timestamp: milliseconds.
        location: URI of the model's artifacts.
    """

    name: str
    version: str
    run_id: str | None
    creation_timestamp: int
    location: str
    aliases: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)


def read_versions(uri: str, name: str) -> list[LocalVersion] | None:
    """All versions of a registered model, newest first, with sorted aliases; None if MLflow must be asked."""
    path = uri.removeprefix(SQLITE)
    if not uri.startswith(SQLITE) or set(path) & set("?%") or not Path(path).is_file():
        return None
    try:
        with closing(sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True, timeout=60)) as connection:
            return _read(connection, name)
    except sqlite3.Error:
        return None


def _read(connection: sqlite3.Connection, name: str) -> list[LocalVersion]:
    rows = connection.execute(
        "SELECT version, run_id, creation_time, COALESCE(storage_location, source) FROM model_versions"
        " WHERE name = ? AND workspace = ? AND current_stage IS NOT ? ORDER BY version DESC",
        (name, WORKSPACE, DELETED),
    )
    found = {version: LocalVersion(name, str(version), *rest) for version, *rest in rows}
    for version, alias in connection.execute(_MORE.format("version, alias", "registered_model_aliases"), (name, WORKSPACE)):
        if version in found:
            found[version].aliases.append(alias)
    for version, key, value in connection.execute(_MORE.format("version, key, value", "model_version_tags"), (name, WORKSPACE)):
        if version in found:
            found[version].tags[key] = value
    return list(found.values())


def find_model(uri: str, model: str) -> Path | None:
    """The directory of a registered model's artifacts on this disk; None if MLflow must be asked.

    Args:
        uri: the store.
        model: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
    """
    name, at, alias = model.removeprefix("models:/").partition("@")
    name, _, number = (name, "", "") if at else name.partition("/")
    wanted = (v for v in read_versions(uri, name) or [] if (alias in v.aliases if at else v.version == number))
    version = next(wanted, None)
    if version is None:
        return None
    location = urlsplit(version.location)
    directory = Path(unquote(location.path))
    return directory if location.scheme in ("", "file") and (directory / "MLmodel").is_file() else None
