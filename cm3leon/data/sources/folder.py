"""The folder source: a directory of images with a CSV, TSV, JSON Lines or parquet manifest, one record a row.

Columns of the file are named as ours, or mapped in ``ingest.folder.columns`` (``{captions: title}``: our column -> the file's). Required:
``image`` (path relative to ``ingest.path``; in parquet files also an encoded image), ``captions`` (text, or a list of texts) and
``licence``, unless ``ingest.folder.license`` states one for all. In text files, lists and mappings are JSON. A row with an error is yielded
with its ``problem``, never dropped. Rows of the same image, as in collections with a row for each caption, become one record.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cm3leon.config.schema import FolderConfig
from cm3leon.data.cells import RowProblem, captions_of, malformed, objects_of, questions_of, reasoning_of, structure_of, text_of
from cm3leon.data.manifest import SourceRow
from cm3leon.data.merging import merge_rows
from cm3leon.data.sources import SourceError
from cm3leon.data.tables import read_table

MANIFEST_COLUMNS = (
    "image", "captions", "licence", "attribution", "source", "key", "group", "long_caption", "objects", "questions", "reasoning",
    "instruction", "edited_from", "conditions", "text_in_image",
)  # fmt: skip
REQUIRED = ("image", "captions", "licence")
ALIASES = {"captions": ("captions", "caption"), "licence": ("licence", "license"), "key": ("key", "id")}
"""Columns of the file that are read, in this order, for one of ours that no mapping names."""


class _Cells(NamedTuple):
    """The cells of a row by our columns, where the row is, and what is wrong with its syntax."""

    values: dict[str, Any]
    origin: str
    fault: str | None


def rows(config: FolderConfig, path: Path) -> Iterator[SourceRow]:
    """Every row of the manifest ``path / config.manifest``, with its image files read; with ``merge``, one for each image path.

    Problems found here: ``missing`` (no image is named, or no such file), ``path_outside_root`` (absolute, through ``..`` or a symbolic
    link), ``file_too_large``, ``unreadable`` (the file cannot be read), ``malformed_row`` (a cell cannot be parsed).

    Raises:
        SourceError: if the manifest does not exist, lies outside of ``path``, lacks a required column, or has no rows.
    """
    manifest = path / config.manifest
    files = _Files(path.resolve(), config.max_file_megabytes)
    if not Path(os.path.normpath(path.absolute() / config.manifest)).is_relative_to(os.path.normpath(path.absolute())):
        raise SourceError(
            f"ingest.folder.manifest {config.manifest} lies outside of ingest.path {path}, the only place in which ingest notices that "
            f"files change; move it there, or let ingest.path name the directory above both"
        )
    found, _ = read_table(manifest)
    mapping = _mapping(config, manifest, found)
    counts = _images(manifest, mapping["image"]) if config.merge == "image" else Counter[str]()
    waiting: dict[str, list[_Cells]] = {}
    empty = True
    for location, table_cells, fault in read_table(manifest)[1]:
        empty = False
        cells = _Cells({ours: table_cells.get(theirs) for ours, theirs in mapping.items()}, f"{config.manifest} {location}", fault)
        name = _image_name(cells.values)
        if name is None or counts[name] < 2:
            yield _row(cells, files, config)
            continue
        own = waiting.setdefault(name, [])
        own.append(cells)
        if len(own) == counts[name]:
            first, *others = waiting.pop(name)
            row = _row(first, files, config)
            yield from merge_rows([row, *(_row(other, files, config, read=row.image is None) for other in others)])
    if empty:
        raise SourceError(f"{manifest} has columns ({', '.join(found)}) but no rows; add one row for each image")


def _images(manifest: Path, column: str) -> Counter[str]:
    """The number of rows of each image path."""
    names = (_image_name({"image": cells.get(column)}) for _, cells, _ in read_table(manifest)[1])
    return Counter(name for name in names if name is not None)


def _image_name(cells: dict[str, Any]) -> str | None:
    """The path of a row's image; None if it has none, or holds the image itself."""
    cell = cells.get("image")
    if isinstance(cell, dict):
        cell = None if cell.get("bytes") else cell.get("path")
    try:
        name = None if isinstance(cell, bytes) else text_of(cell)
    except RowProblem:
        return None
    return name and os.path.normpath(name)


def _mapping(config: FolderConfig, manifest: Path, found: list[str]) -> dict[str, str]:
    """Our column -> the file's, for the columns that the file has."""
    listing = ", ".join(found) or "none"
    # 1. What the parameters say has to exist on both sides: a typo must not lose a column in silence.
    for ours, theirs in config.columns.items():
        if ours not in MANIFEST_COLUMNS:
            raise SourceError(
                f"ingest.folder.columns.{ours}: there is no manifest column {ours!r}; columns are {', '.join(MANIFEST_COLUMNS)}"
            )
        if theirs not in found:
            raise SourceError(f"ingest.folder.columns.{ours}: {manifest} has no column {theirs!r}; its columns are: {listing}")
    # 2. The other columns by their known names, the first that the file has.
    mapping = dict(config.columns)
    for ours in MANIFEST_COLUMNS:
        known = next((name for alias in ALIASES.get(ours, (ours,)) for name in found if name.lower() == alias), None)
        if ours not in mapping and known is not None:
            mapping[ours] = known
    # 3. A license may come from the parameters instead, the same for all rows.
    for ours in REQUIRED:
        if ours not in mapping and not (ours == "licence" and config.license):
            alternative = ", or state one license for all rows with ingest.folder.license" if ours == "licence" else ""
            raise SourceError(
                f"{manifest} has no column {ours!r}; its columns are: {listing}. Say which one it is in params.yaml, "
                f"e.g. ingest.folder.columns: {{{ours}: {found[0] if found else 'COLUMN'}}}{alternative}"
            )
    return mapping


def _row(cells: _Cells, files: _Files, config: FolderConfig, read: bool = True) -> SourceRow:
    """One row with its problems, and with every cell that could be parsed; without its image if it is not to be read."""
    values, origin, fault = cells
    problems = [RowProblem("malformed_row", fault)] if fault else []

    def attempt(column: str, parse: Any, default: Any = None) -> Any:
        try:
            return parse(values.get(column))
        except RowProblem as problem:
            problems.append(RowProblem(problem.reason, f"{column}: {problem.detail}"))
            return default

    def text(column: str) -> str | None:
        found: str | None = attempt(column, text_of)
        return found

    name = _image_name(values)
    row = SourceRow(
        key=text("key") or name or origin,
        origin=origin,
        image=attempt("image", files.image) if read else None,
        extension=_extension(name),
        captions=attempt("captions", captions_of, []),
        licence=text("licence") or config.license,
        attribution=text("attribution") or config.attribution,
        source=text("source") or config.source,
        group=text("group"),
        long_caption=text("long_caption"),
        objects=attempt("objects", objects_of, []),
        questions=attempt("questions", questions_of, []),
        reasoning=attempt("reasoning", reasoning_of, []),
        instruction=text("instruction"),
        edited_from=text("edited_from"),
        conditions=attempt("conditions", files.conditions, {}),
        text_in_image=text("text_in_image"),
    )
    if problems:
        row.problem = ",".join(dict.fromkeys(problem.reason for problem in problems))
        row.detail = "; ".join(problem.detail for problem in problems)
    return row


def _extension(name: str | None) -> str:
    suffix = Path(name or "").suffix[1:].lower()
    return suffix if suffix.isascii() and suffix.isalnum() and len(suffix) <= 5 else "bin"


@dataclass(frozen=True)
class _Files:
    """The files of a collection, which lie under ``root``; those of more than ``megabytes`` are not read."""

    root: Path
    megabytes: float

    def image(self, cell: Any) -> bytes:
        """The image of a cell: the file that it names, or the cell's own, as Hugging Face's ``datasets`` writes parquet files."""
        given = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(given, bytes) and given:
            self._check_size("the image", len(given))
            return given
        return self.read(text_of(cell.get("path") if isinstance(cell, dict) else cell))

    def conditions(self, cell: Any) -> dict[str, bytes]:
        """The condition images that a cell names, by kind."""
        expected = 'a JSON mapping of kind to image path, {"edges": "edges/1.png"}'
        value = structure_of(cell, expected)
        if isinstance(value, list) and all(isinstance(item, dict) and {"kind", "image"} <= set(item) for item in value):
            value = {text_of(item["kind"]): item["image"] for item in value}
        if value is not None and not isinstance(value, dict):
            raise malformed(expected, cell)
        names = {kind: text_of(name) for kind, name in (value or {}).items()}
        return {str(kind): self.read(name) for kind, name in names.items() if kind and name}

    def read(self, name: str | None) -> bytes:
        """The bytes of a file."""
        if name is None:
            raise RowProblem("missing", "the cell is empty")
        # A name with accents may have been composed by one program, and decomposed by another (Unicode's forms NFC and NFD).
        for form in dict.fromkeys([name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]):
            try:
                file = (self.root / form).resolve()
                if not file.is_relative_to(self.root):
                    raise RowProblem("path_outside_root", name)
                status = file.stat()
                if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
                    continue
                self._check_size(name, status.st_size)
                return file.read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                continue
            except (OSError, RuntimeError) as error:
                raise RowProblem("unreadable", f"{name}: {getattr(error, 'strerror', None) or error}") from None
            except RowProblem:
                raise
            except ValueError as error:  # a null byte in the name
                raise RowProblem("malformed_row", f"{name!r}: {error}") from None
        if "://" in name:
            raise RowProblem("missing", f"{name} is a URL: download the images, and name their files")
        raise RowProblem("missing", f"{name} is no file")

    def _check_size(self, name: str, size: int) -> None:
        if size > self.megabytes * 1e6:
            raise RowProblem("file_too_large", f"{name} has {size / 1e6:,.0f} MB, {self.megabytes:,g} allowed")
