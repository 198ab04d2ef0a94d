"""The folder source: a directory of images with a CSV, TSV, JSON Lines or parquet manifest, one record a row.

Columns of the file are named as ours, or mapped in ``ingest.folder.columns`` (``{captions: title}``: our column -> the file's). Required:
``image`` (path relative to ``ingest.path``; in parquet files also an encoded image), ``captions`` (text, or a list of texts) and
``licence``, unless ``ingest.folder.license`` states one for all. In text files, lists and mappings are JSON. A row with an error is yielded
with its ``problem``, never dropped. Rows of the same image, as in collections with a row for each caption, become one record.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cm3leon.config.ingest_schema import FolderConfig
from cm3leon.data.manifest import SourceRow
from cm3leon.data.merging import merge_rows
from cm3leon.data.sources import SourceError
from cm3leon.data.sources.records import MANIFEST_COLUMNS, Cells, Files, check_columns, image_name, known_columns, row_of
from cm3leon.data.tables import read_table

REQUIRED = ("image", "captions", "licence")


def rows(config: FolderConfig, path: Path) -> Iterator[SourceRow]:
    """Every row of the manifest ``path / config.manifest``, with its image files read; with ``merge``, one for each image path.

    Problems found here: ``missing`` (no image is named, or no such file), ``path_outside_root`` (absolute, through ``..`` or a symbolic
    link), ``file_too_large``, ``unreadable`` (the file cannot be read), ``malformed_row`` (a cell cannot be parsed).

    Raises:
        SourceError: if the manifest does not exist, lies outside of ``path``, lacks a required column, or has no rows.
    """
    manifest = manifest_of(config, path)
    files = Files(path.resolve(), config.max_file_megabytes)
    found, table_rows = read_table(manifest)
    mapping = _mapping(config, manifest, found)
    counts = _images(manifest, mapping["image"]) if config.merge == "image" else Counter[str]()
    waiting: dict[str, list[Cells]] = {}
    empty = True
    for location, table_cells, fault in table_rows:
        empty = False
        cells = Cells({ours: table_cells.get(theirs) for ours, theirs in mapping.items()}, f"{config.manifest} {location}", fault)
        name = image_name(cells.values)
        if name is None or counts[name] < 2:
            yield row_of(cells, files, config)
            continue
        own = waiting.setdefault(name, [])
        own.append(cells)
        if len(own) == counts[name]:
            first, *others = waiting.pop(name)
            row = row_of(first, files, config)
            yield from merge_rows([row, *(row_of(other, files, config, read=row.image is None) for other in others)])
    if empty:
        raise SourceError(f"{manifest} has columns ({', '.join(found)}) but no rows; add one row for each image")


def manifest_of(config: FolderConfig, path: Path) -> Path:
    """The manifest; SourceError if it lies outside of the collection."""
    if not Path(os.path.normpath(path.absolute() / config.manifest)).is_relative_to(os.path.normpath(path.absolute())):
        raise SourceError(
            f"ingest.folder.manifest {config.manifest} lies outside of ingest.path {path}, the only place in which ingest notices that "
            f"files change; move it there, or let ingest.path name the directory above both"
        )
    return path / config.manifest


def _images(manifest: Path, column: str) -> Counter[str]:
    """The number of rows of each image path; none of a manifest that holds the images itself, which is not read twice."""
    counts: Counter[str] = Counter()
    for _, cells, _ in read_table(manifest)[1]:
        name = image_name({"image": cells.get(column)})
        if name is not None:
            counts[name] += 1
        elif isinstance(cells.get(column), (bytes, dict)):
            return Counter()
    return counts


def mapping_of(config: FolderConfig, path: Path) -> dict[str, str]:
    """Our column -> the manifest's, for the columns that the manifest has; SourceError as :func:`rows`."""
    manifest = manifest_of(config, path)
    return _mapping(config, manifest, read_table(manifest)[0])


def _mapping(config: FolderConfig, manifest: Path, found: list[str]) -> dict[str, str]:
    listing = ", ".join(found) or "none"
    # 1. What the parameters say has to exist on both sides: a typo must not lose a column in silence.
    check_columns(config.columns, MANIFEST_COLUMNS, "ingest.folder")
    for ours, theirs in config.columns.items():
        if theirs not in found:
            raise SourceError(f"ingest.folder.columns.{ours}: {manifest} has no column {theirs!r}; its columns are: {listing}")
    # 2. The other columns by their known names, the first that the file has.
    mapping = {**known_columns(found), **config.columns}
    # 3. A license may come from the parameters instead, the same for all rows.
    for ours in REQUIRED:
        if ours not in mapping and not (ours == "licence" and config.license):
            alternative = ", or state one license for all rows with ingest.folder.license" if ours == "licence" else ""
            raise SourceError(
                f"{manifest} has no column {ours!r}; its columns are: {listing}. Say which one it is in params.yaml, "
                f"e.g. ingest.folder.columns: {{{ours}: {found[0] if found else 'COLUMN'}}}{alternative}"
            )
    return mapping
