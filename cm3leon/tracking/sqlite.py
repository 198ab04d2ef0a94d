"""URIs of SQLite files for SQLAlchemy, whatever characters their path has; the addresses of artifacts in MLflow's file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

if TYPE_CHECKING:
    from sqlite3 import Connection

ADDRESSES = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}
"""The columns of MLflow's tables that hold addresses of artifacts."""


def has_uri_characters(path: Path) -> bool:
    """True if the path cannot stand in a URI as it is: ``?`` begins the query, and some versions of SQLAlchemy decode ``%``."""
    return bool(set("?%") & set(str(path)))


def sqlite_uri(path: Path, driver: str = "pysqlite") -> str:
    """The URI of a SQLite file, with an absolute path.

    A path with characters of a URI is written as SQLite's own ``file:`` URI inside SQLAlchemy's. It names the driver because for the bare
    scheme MLflow makes the file's directory, under the name that it has in the URI.
    """
    path = path.absolute()
    if not has_uri_characters(path):
        return f"sqlite:///{path}"
    from sqlalchemy.engine import URL

    return URL.create(f"sqlite+{driver}", database=f"file:{quote(str(path))}", query={"uri": "true"}).render_as_string()


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite URI; None for any other URI, for a database in memory, and for what is no URI."""
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except ArgumentError:
        return None
    database = url.database or ""
    if "uri" in url.query:
        database = unquote(urlsplit(database).path)
    return None if database in ("", ":memory:") else Path(database)


def move_artifacts(connection: Connection, old: str, new: str) -> None:
    """Change the addresses in MLflow's tables from below the address ``old`` to below ``new``; the artifacts themselves stay."""
    for table, columns in ADDRESSES.items():
        for column in columns:
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
            )
