"""Rows of CSV, TSV, JSON Lines and parquet files, read one at a time, so that files of any size fit in memory."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cm3leon.data.cells import parse_json, shown
from cm3leon.data.sources import SourceError

Row = tuple[str, dict[str, Any], str | None]
"""Location of the row in the file ("line 12"), its cells by column, and what is wrong with its syntax (else None)."""

CELL_CHARACTERS = 16 << 20
"""Most characters in a cell of a CSV file."""


def read_table(path: Path) -> tuple[list[str], Iterator[Row]]:
    """Column names, and an iterator that reads the rows.

    Raises:
        SourceError: if the file does not exist, has another format, is empty, or its encoding or syntax is invalid.
    """
    if not path.is_file():
        raise SourceError(f"{path} does not exist; ingest.path names the directory and ingest.folder.manifest the file in it")
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise SourceError(f"{path}: the format of a manifest is one of {', '.join(readers)}, not {path.suffix!r}; convert the file")
    return readers[path.suffix.lower()](path)


def _csv(path: Path) -> tuple[list[str], Iterator[Row]]:
    csv.field_size_limit(CELL_CHARACTERS)
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    first = next(_lines(path, separator), None)
    if first is None:
        raise SourceError(f"{path} is empty; its first line must name the columns")
    names = [name.strip() for name in first[1]]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise SourceError(f"{path} names a column twice: {', '.join(repeated)}; rename one of them")

    def rows() -> Iterator[Row]:
        lines = _lines(path, separator)
        next(lines)
        for number, cells in lines:
            fault = None if len(cells) == len(names) else f"{len(cells)} cells where the header names {len(names)}"
            yield f"line {number}", dict(zip(names, cells, strict=False)), fault

    return names, rows()


def _lines(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Number of the line on which each row begins, and its cells; blank lines are no rows."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise SourceError(f"{path} is not UTF-8 (after line {number}: {error.reason}); save it as UTF-8") from None
            except csv.Error as error:
                raise SourceError(f"{path}, row that begins on line {number}: {error}; correct its quotes") from None
            if cells:
                yield number, cells


def _jsonl(path: Path) -> tuple[list[str], Iterator[Row]]:
    # A pass of its own for the names: a column may occur only in a late row.
    names: dict[str, None] = {}
    for _, cells, _ in _json_rows(path):
        names.update(dict.fromkeys(cells))
    return list(names), _json_rows(path)


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                cells = parse_json(line)
                fault = None if isinstance(cells, dict) else f"expected a JSON object, found {shown(line.decode(errors='replace'))}"
            except ValueError as error:
                cells, fault = {}, f"not JSON: {error}"
            yield f"line {number}", cells if isinstance(cells, dict) else {}, fault


def _parquet(path: Path) -> tuple[list[str], Iterator[Row]]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise SourceError(f"{path} is not a parquet file ({error}); write it again") from None

    def rows() -> Iterator[Row]:
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for cells in batch.to_pylist():
                yield f"row {number}", cells, None
                number += 1

    return file.schema_arrow.names, rows()
