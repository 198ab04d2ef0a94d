"""A record of files: its cells by our columns, and the image files that they name."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cm3leon.config.ingest_schema import CollectionConfig
from cm3leon.data.cells import RowProblem, captions_of, malformed, objects_of, questions_of, reasoning_of, split_of, structure_of, text_of
from cm3leon.data.manifest import SourceRow
from cm3leon.data.sources import SourceError, tell

MANIFEST_COLUMNS = (
    "image", "captions", "licence", "attribution", "source", "key", "group", "long_caption", "objects", "questions", "reasoning",
    "instruction", "edited_from", "conditions", "text_in_image", "split",
)  # fmt: skip
ALIASES = {
    "image": ("image", "file_name", "filename", "image_name", "image_path"),
    "captions": ("captions", "caption", "text", "comment"),
    "licence": ("licence", "license"),
    "key": ("key", "id"),
}
"""Columns of a file that are read, in this order, for one of ours that no mapping names: those of Hugging Face's ``imagefolder`` and of
Flickr30k too."""


class Cells(NamedTuple):
    """The cells of a row by our columns, where the row is, and what is wrong with its syntax."""

    values: dict[str, Any]
    origin: str
    fault: str | None


def known_columns(names: Iterable[str]) -> dict[str, str]:
    """Our column -> the one of ``names`` that is called so, in any case, or as one of :data:`ALIASES`.

    Of names that differ in case only, the one in lower case counts, else the first.
    """
    theirs: dict[str, str] = {}
    for name in sorted(names, key=lambda name: not name.islower()):
        theirs.setdefault(name.lower(), name)
    found = ((ours, [theirs[alias] for alias in ALIASES.get(ours, (ours,)) if alias in theirs]) for ours in MANIFEST_COLUMNS)
    return {ours: known[0] for ours, known in found if known}


class Columns:
    """The columns of records whose fields have any names: those that parameters name (ours -> theirs), and others by their known names."""

    def __init__(self, columns: Mapping[str, str], section: str) -> None:
        """Raises SourceError for a column that there is not: a typo must not lose one in silence."""
        check_columns(columns, MANIFEST_COLUMNS, section)
        self._columns, self._section = columns, section
        self._unseen = dict.fromkeys(columns.values())

    def mapped(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a record by our columns."""
        for name in [name for name in self._unseen if name in fields]:
            del self._unseen[name]
        return {ours: fields[theirs] for ours, theirs in {**known_columns(fields), **self._columns}.items() if theirs in fields}

    def tell_unseen(self) -> None:
        """Print which fields that the parameters name no record has had."""
        if self._unseen:
            tell(f"{self._section}.columns names {', '.join(self._unseen)}, which no record has: correct the name")


def check_columns(columns: Iterable[str], known: Sequence[str], section: str) -> None:
    """SourceError if one of ``columns``, which the parameter ``section.columns`` maps, is none of those that are ``known``."""
    for ours in columns:
        if ours not in known:
            raise SourceError(f"{section}.columns.{ours}: there is no manifest column {ours!r}; columns are {', '.join(known)}")


def row_of(cells: Cells, files: Files, config: CollectionConfig, read: bool = True) -> SourceRow:
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

    name = image_name(values)
    row = SourceRow(
        key=text("key") or name or origin,
        origin=origin,
        image=attempt("image", files.image) if read else None,
        extension=_extension(values.get("image")),
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
        split=attempt("split", split_of),
    )
    add_problems(row, problems)
    return row


def add_problems(row: SourceRow, problems: Iterable[RowProblem]) -> None:
    """Record the problems in a row, after those that it has."""
    for problem in problems:
        reasons = [*(row.problem or "").split(","), problem.reason]
        row.problem = ",".join(dict.fromkeys(filter(None, reasons)))
        row.detail = "; ".join(filter(None, [row.detail, problem.detail]))


def image_name(cells: dict[str, Any]) -> str | None:
    """The path of a row's image; None if it has none, or holds the image itself."""
    cell = cells.get("image")
    if isinstance(cell, dict):
        cell = None if cell.get("bytes") else cell.get("path")
    try:
        name = None if isinstance(cell, bytes) else text_of(cell)
    except RowProblem:
        return None
    return name and os.path.normpath(name)


def _extension(cell: Any) -> str:
    """The suffix of the file's name in an image cell; "bin" without one."""
    name = cell.get("path") if isinstance(cell, dict) else cell
    suffix = Path(name).suffix[1:].lower() if isinstance(name, str) else ""
    return suffix if suffix.isascii() and suffix.isalnum() and len(suffix) <= 5 else "bin"


@dataclass(frozen=True)
class Files:
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
        expected = 'a JSON mapping of kind to image path, {"canny edge": "edges/1.png"}'
        value = structure_of(cell, expected)
        if isinstance(value, list) and all(isinstance(item, dict) and {"kind", "image"} <= set(item) for item in value):
            value = {text_of(item["kind"]): item["image"] for item in value}
        if isinstance(value, list) and all(isinstance(item, tuple) and len(item) == 2 for item in value):  # a map of parquet
            value = dict(value)
        if value is not None and not isinstance(value, dict):
            raise malformed(expected, cell)
        names = {kind: text_of(name) for kind, name in (value or {}).items()}
        return {str(kind): self.read(name) for kind, name in names.items() if kind and name}

    def read(self, name: str | None) -> bytes:
        """The bytes of a file."""
        if name is None:
            raise RowProblem("missing", "the cell is empty")
        # A name with accents may have been composed by one program, and decomposed by another (Unicode's forms NFC and NFD). Windows
        # writes a backslash between directories.
        forms = [name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]
        for form in dict.fromkeys([*forms, *(form.replace("\\", "/") for form in forms)]):
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
            raise too_large(name, size, self.megabytes)


def too_large(name: str, size: int, megabytes: float) -> RowProblem:
    """The error of a file of ``size`` bytes."""
    return RowProblem("file_too_large", f"{name} has {size / 1e6:,.1f} MB, {megabytes:,g} allowed")
