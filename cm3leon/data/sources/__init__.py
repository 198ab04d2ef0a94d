"""Where documents come from: each module here is a source, found by its name.

A source is one file with ``rows(config, path) -> Iterator[SourceRow]``: ``config`` is the section ``ingest.NAME`` of the parameters
(its class stands in ``config.py``), ``path`` the collection's root, ``ingest.path``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

from cm3leon.config import IngestConfig
from cm3leon.data.manifest import SourceRow


class SourceError(ValueError):
    """A collection cannot be read as configured."""


def source_rows(config: IngestConfig) -> Iterator[SourceRow]:
    """The rows of the source named ``config.source``.

    Raises:
        SourceError: if there is no such source, or the collection cannot be read.
    """
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    module = importlib.import_module(f"{__name__}.{config.source}") if config.source in known else None
    section = getattr(config, config.source, None)
    if module is None or section is None or not hasattr(module, "rows"):
        raise SourceError(f"ingest.source: there is no source {config.source!r} with a section ingest.{config.source}")
    yield from module.rows(section, Path(config.path))
