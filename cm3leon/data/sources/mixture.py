"""The mixture: several collections below ``ingest.path`` become one, each read by its own source, with a weight of its own.

Rows of the same image file, byte for byte, become one record, whichever parts they are of: captions of one with the questions or boxes of
another. License and attribution may come from either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cm3leon.config.ingest_schema import IngestConfig, MixturePart
from cm3leon.data.manifest import SourceRow
from cm3leon.data.merging import merge_images
from cm3leon.data.sources import SourceError

Sources = Mapping[str, Callable[[Any, Path], Iterator[SourceRow]]]
"""The sources by name."""


def rows(parts: Sequence[MixturePart], path: Path, sources: Sources) -> Iterator[SourceRow]:
    """The rows of all parts, those of one image merged; each collection is read twice.

    Raises:
        SourceError: if one cannot be read as configured.
    """
    yield from merge_images(lambda: (row for number in range(len(parts)) for row in rows_of_part(parts, number, path, sources)))


def rows_of_part(parts: Sequence[MixturePart], number: int, path: Path, sources: Sources) -> Iterator[SourceRow]:
    """The rows of one part with its weight; their keys begin with its number, so that those of different parts do not meet.

    Raises:
        SourceError: if it cannot be read as configured.
    """
    part = parts[number]
    try:
        for row in sources[part.source](IngestConfig.options_of(part), path / part.path):
            yield replace(
                row,
                key=f"{number}:{row.key}",
                other_keys=[f"{number}:{key}" for key in row.other_keys],
                edited_from=None if row.edited_from is None else f"{number}:{row.edited_from}",
                origin=f"{part.path or part.source}: {row.origin}",
                weight=part.weight,
            )
    except SourceError as error:  # it names the parameters of the section, which are here those of the part
        raise SourceError(str(error).replace(f"ingest.{part.source}.", f"ingest.mixture.{number}.options.")) from None
