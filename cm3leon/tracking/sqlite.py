"""URIs of SQLite files for SQLAlchemy, whatever characters their path has."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote, urlsplit


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
