"""Sources of records: one module for each source, with a function ``rows(config, path) -> Iterator[SourceRow]``.

``config`` is the section ``ingest.NAME`` of the parameters (its class is in ``config/ingest_schema.py``) and ``path`` is the collection's
root, ``ingest.path``. ``stages/ingest.py`` lists the sources by name; the procedural one is ``scenes/source.py``.
"""

from __future__ import annotations

import functools

from cm3leon.utils.errors import UserError


class SourceError(UserError):
    """A collection cannot be read as configured."""


@functools.cache
def tell(message: str) -> None:
    """Print what a person should know of a collection, once: a mixture reads its parts twice."""
    print(message, flush=True)
