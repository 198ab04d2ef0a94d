"""Rows of CSV, TSV, JSON Lines and parquet files, one at a time, whatever the size of the file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cm3leon.data.sources import SourceError

Record = tuple[str, dict[str, Any], str | None]
"""Where the row stands in the file ("line 12"), its cells, and what is wrong with its form (else None)."""

CELL_CHARACTERS = 16 << 20


def parse_json(text: str | bytes) -> Any:
    """Parsed JSON; ValueError also for text that UTF-8 cannot hold (half of a surrogate pair)."""
    value = json.loads(text)
    if (b"\\u" if isinstance(text, bytes) else "\\u") in text:  # type: ignore[operator]
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_table(path: Path) -> tuple[list[str], Iterator[Record]]:
    """Column names, and the rows as they are read.

    Raises:
        SourceError: if the file does not exist, is of another kind, is empty, or its encoding or form is broken.
    """
    if not path.is_file():
        raise SourceError(f"{path} does not exist; ingest.path names the directory and ingest.folder.manifest the file in it")
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise SourceError(f"{path}: a manifest is one of {', '.join(readers)}, not {path.suffix!r}")
    return readers[path.suffix.lower()](path)


def _csv(path: Path) -> tuple[list[str], Iterator[Record]]:
    csv.field_size_limit(CELL_CHARACTERS)
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    first = next(_lines(path, separator), None)
    if first is None:
        raise SourceError(f"{path} is empty; its first line must name the columns")
    names = [name.strip() for name in first[1]]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise SourceError(f"{path} names a column twice: {', '.join(double)}")

    def records() -> Iterator[Record]:
        lines = _lines(path, separator)
        next(lines)
        for number, cells in lines:
            fault = None if len(cells) == len(names) else f"{len(cells)} cells where the header names {len(names)}"
            yield f"line {number}", dict(zip(names, cells, strict=False)), fault

    return names, records()


def _lines(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Number of the line a row begins on, and its cells; blank lines hold no row."""
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
                raise SourceError(f"{path}, row that begins on line {number}: {error}") from None
            if cells:
                yield number, cells


def _jsonl(path: Path) -> tuple[list[str], Iterator[Record]]:
    names: dict[str, None] = {}
    for _, record, _ in _json_records(path):
        names.update(dict.fromkeys(record))
    return list(names), _json_records(path)


def _json_records(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = parse_json(line)
                fault = None if isinstance(record, dict) else f"expected a JSON object, found {line[:60]!r}"
            except ValueError as error:
                record, fault = {}, f"not JSON: {error}"
            yield f"line {number}", record if isinstance(record, dict) else {}, fault


def _parquet(path: Path) -> tuple[list[str], Iterator[Record]]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise SourceError(f"{path} is no parquet file: {error}") from None

    def records() -> Iterator[Record]:
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                yield f"row {number}", record, None
                number += 1

    return file.schema_arrow.names, records()
