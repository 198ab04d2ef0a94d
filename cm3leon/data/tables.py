"""Rows of CSV, TSV, JSON Lines and parquet files, read one at a time, so that files of any size fit in memory."""

from __future__ import annotations

import codecs
import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
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
SEPARATORS = (",", ";", "\t", "|")
"""Of a CSV file: the one that gives the most columns in the header."""
NULLS = frozenset(("NaN", "nan", "NaT", "None", "null", "NULL", "<NA>"))
"""What pandas, Python and databases write into a cell of a CSV file that holds nothing. As a group they would join all such rows."""
PARQUET_ROWS = 64
"""Rows of a parquet file that are read at once; they may hold images."""
UTF16 = (b"\xff\xfe", b"\xfe\xff")
"""The byte order marks with which UTF-16 files begin."""


def read_table(path: Path) -> tuple[list[str], Iterator[Row]]:
    """Column names, and an iterator that reads the rows. A directory is read as its parquet files, in the order of their names.

    Raises:
        SourceError: if the file does not exist, has another format, is empty or damaged, or its encoding or syntax is invalid.
    """
    if path.is_dir():
        return _parquet_files(path)
    if not path.exists():
        raise SourceError(
            f"{path} does not exist; ingest.path names the directory, the section of the source (ingest.SOURCE) the files in it"
        )
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise SourceError(f"{path}: the format of a manifest is one of {', '.join(readers)}, not {path.suffix!r}; convert the file")
    return readers[path.suffix.lower()](path)


def _check_names(path: Path, names: Sequence[str]) -> None:
    """SourceError if a column is named twice: a row would have the cell of one of them only."""
    repeated = sorted(name for name, count in Counter(filter(None, names)).items() if count > 1)
    if repeated:
        raise SourceError(f"{path} names a column twice: {', '.join(repeated)}; rename one of them")


# --- text ------------------------------------------------------------------------------------------------------------


def _open_text(path: Path) -> io.TextIOWrapper:
    """A text file in UTF-8, or in UTF-16 as its byte order mark says."""
    with path.open("rb") as file:
        start = file.read(64)
    if start[:2] not in UTF16 and b"\0" in start:
        raise SourceError(f"{path} has null bytes at its start, as UTF-16 without a byte order mark; save it as UTF-8")
    return path.open(encoding="utf-16" if start[:2] in UTF16 else "utf-8-sig", newline="")


def _not_utf8(path: Path) -> SourceError:
    """The error of a text file that is not UTF-8: the first line that is not, and what it would be in Latin-1."""
    with path.open("rb") as file:
        if file.read(2) in UTF16:
            return SourceError(f"{path} is not UTF-16 to its end; it may be truncated: save it again, as UTF-8")
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                near = line[max(0, error.start - 20) : error.end + 20].decode("latin-1").strip()
                return SourceError(f"{path}, line {number}, is not UTF-8; read as Latin-1 it has {near!r}: save the file as UTF-8")
    return SourceError(f"{path} is neither UTF-8 nor UTF-16; save it as UTF-8")


# --- CSV -------------------------------------------------------------------------------------------------------------


def _csv(path: Path) -> tuple[list[str], Iterator[Row]]:
    csv.field_size_limit(CELL_CHARACTERS)
    separators = ("\t",) if path.suffix.lower() == ".tsv" else SEPARATORS
    headers: dict[str, list[str]] = {}
    for candidate in separators:
        try:
            headers[candidate] = next(_lines(path, candidate), (0, []))[1]
        except SourceError:  # quotes that make no sense with this separator
            if candidate == separators[-1] and not headers:
                raise
    separator = max(headers, key=lambda found: len(headers[found]))
    quoted = separator != "\t" or _has_quoted_cells(path)
    names = [name.strip() for name in headers[separator]]
    if not any(names):
        raise SourceError(f"{path} is empty; its first line must name the columns")
    _check_names(path, names)

    def rows() -> Iterator[Row]:
        lines = _lines(path, separator, quoted)
        next(lines)
        for number, cells in lines:
            fault = None if len(cells) == len(names) else f"{len(cells)} cells where the header names {len(names)}"
            yield f"line {number}", {name: "" if cell in NULLS else cell for name, cell in zip(names, cells, strict=False) if name}, fault

    return [name for name in names if name], rows()


def _has_quoted_cells(path: Path) -> bool:
    """Whether quotes enclose cells in a file with tabs. Many programs write no such quotes, and a caption may begin with one.

    Read as a cell in quotes that would not end, or only at a quote some rows later, with the tabs of these rows in it. A file that has such
    cells is read without quotes if each of its lines then has all columns.
    """
    try:
        if not any("\t" in cell and "\n" in cell for _, cells in _lines(path, "\t") for cell in cells):
            return True
    except SourceError:
        pass
    return len({len(cells) for _, cells in _lines(path, "\t", quoted=False)}) > 1


def _lines(path: Path, separator: str, quoted: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Number of the line on which each row begins, and its cells; a line without a cell that has content is no row.

    Args:
        quoted: a cell in quotes may hold separators and line breaks; else quotes are characters as others are.
    """
    with _open_text(path) as file:
        reader = csv.reader(file, delimiter=separator, strict=True, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except UnicodeError:
                raise _not_utf8(path) from None
            except csv.Error as error:
                raise SourceError(f"{path}, row that begins on line {number}: {error}; correct its quotes") from None
            if any(cells):
                yield number, cells


# --- JSON Lines ------------------------------------------------------------------------------------------------------


def _jsonl(path: Path) -> tuple[list[str], Iterator[Row]]:
    # A pass of its own for the names: a column may occur only in a late row.
    names: dict[str, None] = {}
    for _, cells, _ in _json_rows(path):
        names.update(dict.fromkeys(cells))
    return list(names), _json_rows(path)


def _json_rows(path: Path) -> Iterator[Row]:
    first = True
    for number, line in enumerate(_encoded_lines(path), 1):
        content = line.strip()
        if not content:
            continue
        if first and (content.startswith(b"[") or content == b"{"):
            kind = "one JSON array" if content.startswith(b"[") else "JSON over several lines"
            raise SourceError(f"{path} is {kind}; in JSON Lines each line is an object: write it again with one record a line")
        first = False
        yield f"line {number}", *_json_cells(content)


def _encoded_lines(path: Path) -> Iterator[bytes]:
    """The lines in UTF-8, or as they are: a line that is not UTF-8 is at fault by itself."""
    with _open_text(path) as text:
        if text.encoding == "utf-16":
            try:
                yield from (line.encode() for line in text)
            except UnicodeError:
                raise _not_utf8(path) from None
            return
    with path.open("rb") as file:
        yield from (line.removeprefix(codecs.BOM_UTF8) for line in file)


def _json_cells(line: bytes) -> tuple[dict[str, Any], str | None]:
    try:
        cells = parse_json(line)
    except ValueError as error:
        return {}, f"not JSON: {error}"
    return (cells, None) if isinstance(cells, dict) else ({}, f"expected a JSON object, found {shown(line.decode(errors='replace'))}")


# --- parquet ---------------------------------------------------------------------------------------------------------


def _parquet_files(directory: Path) -> tuple[list[str], Iterator[Row]]:
    files = sorted(directory.glob("*.parquet"))
    if not files:
        raise SourceError(f"{directory} is a directory without parquet files; name the manifest file in it")
    tables = [_parquet(file) for file in files]
    names = dict.fromkeys(name for found, _ in tables for name in found)

    def rows() -> Iterator[Row]:
        for file, (_, own) in zip(files, tables, strict=True):
            for where, cells, fault in own:
                yield f"{file.name} {where}", cells, fault

    return list(names), rows()


def _parquet(path: Path) -> tuple[list[str], Iterator[Row]]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} is not a parquet file, or it is damaged ({str(error)[:200]}); write it again") from None
    _check_names(path, names)

    def rows() -> Iterator[Row]:
        number = 0
        with pq.ParquetFile(path) as file:
            try:
                for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                    for cells, fault in _cells_of(batch):
                        yield f"row {number}", cells, fault
                        number += 1
            except (pa.ArrowException, OSError) as error:
                raise SourceError(f"{path} is damaged after row {number} ({str(error)[:200]}); write it again") from None

    return names, rows()


class _Unreadable:
    """In place of a cell that has no value in Python, such as a date after the year 9999; it only matters where the column is read."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __repr__(self) -> str:
        return f"a value that cannot be read ({self.error})"


def _cells_of(batch: pa.RecordBatch) -> Iterator[tuple[dict[str, Any], str | None]]:
    """The cells of each row, and the columns whose text is not UTF-8."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError, KeyError):  # text that is not UTF-8; dates without end, unknown time zones
        for row in range(batch.num_rows):
            cells, bad = {}, []
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                try:
                    cells[name] = column[row].as_py()
                except UnicodeDecodeError:
                    bad.append(name)
                except (ValueError, OverflowError, KeyError) as error:
                    cells[name] = _Unreadable(error)
            yield cells, f"text that is not UTF-8 in {', '.join(bad)}" if bad else None
    else:
        yield from ((cells, None) for cells in rows)
