"""The folder source: a directory of images with a CSV, TSV, JSON Lines or parquet manifest, one record a row.

Columns of the file are named as ours, or mapped in ``ingest.folder.columns`` (``{captions: title}``: our column -> the file's). Required:
``image`` (path relative to ``ingest.path``), ``captions`` (text, or a JSON list of texts) and ``licence``, unless ``ingest.folder.license``
states one for all. In text files, lists and mappings are JSON. A row with an error is yielded with its ``problem``, never dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cm3leon.config.schema import FolderConfig
from cm3leon.data.manifest import Problem, SourceRow
from cm3leon.data.sources import SourceError
from cm3leon.data.tables import parse_json, read_table

MANIFEST_COLUMNS = (
    "image", "captions", "licence", "attribution", "source", "key", "group", "long_caption", "objects", "questions", "reasoning",
    "instruction", "edited_from", "conditions", "text_in_image",
)  # fmt: skip
REQUIRED = ("image", "captions", "licence")
ALIASES = {"captions": ("captions", "caption"), "licence": ("licence", "license"), "key": ("key", "id")}
"""Columns of the file that are read, in this order, for one of ours that no mapping names."""


class _RowProblem(ValueError):
    """An error in one row: a reason code and a detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def rows(config: FolderConfig, path: Path) -> Iterator[SourceRow]:
    """Every row of the manifest ``path / config.manifest``, with its image files read.

    Problems found here: ``missing`` (no image is named, or no such file), ``path_outside_root`` (absolute, through ``..`` or a symbolic
    link), ``unreadable`` (the file cannot be read), ``malformed_row`` (a cell cannot be parsed).

    Raises:
        SourceError: if the manifest does not exist, lacks a required column, or has no rows.
    """
    manifest = path / config.manifest
    found, table_rows = read_table(manifest)
    mapping = _mapping(config, manifest, found)
    root = path.resolve()
    empty = True
    for location, table_cells, fault in table_rows:
        empty = False
        cells = {ours: table_cells.get(theirs) for ours, theirs in mapping.items()}
        yield _row(cells, f"{config.manifest} {location}", fault, root, config)
    if empty:
        raise SourceError(f"{manifest} has columns ({', '.join(found)}) but no rows; add one row for each image")


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
        known = next((name for name in ALIASES.get(ours, (ours,)) if name in found), None)
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


def _row(cells: dict[str, Any], origin: str, fault: str | None, root: Path, config: FolderConfig) -> SourceRow:
    """One row with its problems, and with every cell that could be parsed."""
    problems = [_RowProblem("malformed_row", fault)] if fault else []

    def attempt(column: str, parse: Any, default: Any) -> Any:
        try:
            return parse(cells.get(column))
        except _RowProblem as problem:
            problems.append(_RowProblem(problem.reason, f"{column}: {problem.detail}"))
            return default

    name = _text(cells.get("image"))
    image = attempt("image", lambda cell: _read(root, _text(cell)), None)
    row = SourceRow(
        key=_text(cells.get("key")) or name or origin,
        origin=origin,
        image=image,
        extension=_extension(name),
        captions=attempt("captions", _captions, []),
        licence=_text(cells.get("licence")) or config.license,
        attribution=_text(cells.get("attribution")) or config.attribution,
        source=_text(cells.get("source")) or config.source,
        group=_text(cells.get("group")),
        long_caption=_text(cells.get("long_caption")),
        objects=attempt("objects", _objects, []),
        questions=attempt("questions", _questions, []),
        reasoning=attempt("reasoning", _reasoning, []),
        instruction=_text(cells.get("instruction")),
        edited_from=_text(cells.get("edited_from")),
        conditions=attempt("conditions", lambda cell: _conditions(root, cell), {}),
        text_in_image=_text(cells.get("text_in_image")),
    )
    if problems:
        row.problem = ",".join(dict.fromkeys(problem.reason for problem in problems))
        row.detail = "; ".join(problem.detail for problem in problems)
    return row


def _text(cell: Any) -> str | None:
    """Text without surrounding blanks; None for an empty cell."""
    text = "" if cell is None or cell != cell else str(cell).strip()  # NaN is an empty cell of a parquet file
    return text or None


def _extension(name: str | None) -> str:
    suffix = Path(name or "").suffix[1:].lower()
    return suffix if suffix.isascii() and suffix.isalnum() and len(suffix) <= 5 else "bin"


def _read(root: Path, name: str | None) -> bytes:
    """The bytes of a file under ``root``."""
    if name is None:
        raise _RowProblem("missing", "the cell is empty")
    try:
        file = (root / name).resolve()
        if not file.is_relative_to(root):
            raise _RowProblem("path_outside_root", name)
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise _RowProblem("missing", f"{name} is no file") from None
    except (OSError, RuntimeError) as error:
        raise _RowProblem("unreadable", f"{name}: {getattr(error, 'strerror', None) or error}") from None
    except _RowProblem:
        raise
    except ValueError as error:  # a null byte in the name
        raise _RowProblem("malformed_row", f"{name!r}: {error}") from None


def _json(cell: Any, expected: str) -> Any:
    """A list or mapping: unchanged from parquet and JSON Lines, parsed from a text cell; None for an empty cell."""
    if not isinstance(cell, str):
        return None if cell is None or (isinstance(cell, float) and cell != cell) else cell
    if not cell.strip():
        return None
    try:
        return parse_json(cell)
    except ValueError as error:
        raise _RowProblem("malformed_row", f"expected {expected}, {error} in {cell[:60]!r}") from None


def _captions(cell: Any) -> list[str]:
    value = cell
    if isinstance(cell, str):
        value = [cell]
        if cell.lstrip().startswith("["):
            try:
                parsed = parse_json(cell)
                value = parsed if isinstance(parsed, list) else value
            except ValueError:
                if cell.lstrip().startswith('["'):  # else it is a caption that begins with a bracket
                    raise _RowProblem("malformed_row", f"the JSON list is broken: {cell[:60]!r}") from None
    value = [] if value is None or value != value else value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _RowProblem("malformed_row", f"expected text or a list of texts, found {str(cell)[:60]!r}")
    return [item.strip() for item in value]


def _objects(cell: Any) -> list[tuple[str, tuple[float, float, float, float]]]:
    expected = 'a JSON list of {"label": ..., "box": [x0, y0, x1, y1]}'
    value = _json(cell, expected)
    try:
        objects = [(_text(item["label"]) or "", tuple(float(number) for number in item["box"])) for item in value or []]
    except (KeyError, TypeError, ValueError):
        raise _RowProblem("malformed_row", f"expected {expected}, found {str(cell)[:60]!r}") from None
    if any(len(box) != 4 for _, box in objects):
        raise _RowProblem("malformed_row", f"a box has other than four numbers: {str(cell)[:60]!r}")
    if not all(label for label, _ in objects):
        raise _RowProblem("malformed_row", f"an object's label is empty: {str(cell)[:60]!r}")
    return objects  # type: ignore[return-value]


def _questions(cell: Any) -> list[tuple[str, list[str]]]:
    expected = 'a JSON list of {"question": ..., "answers": [...]}'
    value = _json(cell, expected)
    questions = []
    try:
        for item in value or []:
            answers = item["answers"] if "answers" in item else item["answer"]
            texts = [_text(answer) or "" for answer in ([answers] if isinstance(answers, str) else answers)]
            questions.append((_text(item["question"]) or "", texts))
    except (KeyError, TypeError):
        raise _RowProblem("malformed_row", f"expected {expected}, found {str(cell)[:60]!r}") from None
    if any(not question or not answers or "" in answers for question, answers in questions):
        raise _RowProblem("malformed_row", f"a question, its list of answers or an answer is empty: {str(cell)[:60]!r}")
    return questions


def _reasoning(cell: Any) -> list[Problem]:
    expected = (
        'a JSON list of {"question": ..., "options": two or more, "answer": one of them, "explanation": ..., "context": may be left out}'
    )
    value = _json(cell, expected)
    problems = []
    try:
        for item in value or []:
            texts = {name: _text(item[name]) or "" for name in ("question", "answer", "explanation")}
            options = [_text(option) or "" for option in item["options"]]
            if "" in [*texts.values(), *options] or texts["answer"] not in options or len(options) < 2:
                raise ValueError
            problems.append(Problem(options=options, context=_text(item.get("context")) or "", **texts))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise _RowProblem("malformed_row", f"expected {expected}, found {str(cell)[:60]!r}") from None
    return problems


def _conditions(root: Path, cell: Any) -> dict[str, bytes]:
    expected = 'a JSON mapping of kind to image path, {"edges": "edges/1.png"}'
    value = _json(cell, expected)
    if isinstance(value, list) and all(isinstance(item, dict) and {"kind", "image"} <= set(item) for item in value):
        value = {item["kind"]: item["image"] for item in value}
    if value is not None and not isinstance(value, dict):
        raise _RowProblem("malformed_row", f"expected {expected}, found {str(cell)[:60]!r}")
    return {str(kind): _read(root, _text(name)) for kind, name in (value or {}).items() if _text(name)}
