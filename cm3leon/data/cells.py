"""What the cells of a collection's manifest mean: texts, lists and mappings, from parquet, as JSON, or as Python writes them.

A cell that is not understood is an error of its row. No structure is ever turned into its text.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from cm3leon.data.manifest import SPLITS, Problem
from cm3leon.utils.texts import is_blank, is_unicode

SPLIT_NAMES = {
    **{name: name for name in SPLITS}, "training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test",
}  # fmt: skip
"""How people call the splits, in lower case, and how they are called here."""
Box = tuple[float, float, float, float]

_STRING = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_PYTHON_LIST = re.compile(rf"(?:\[\s*{_STRING}(?:[\s,]+{_STRING})*[\s,]*\]|\(\s*{_STRING}\s*,(?:[\s,]*{_STRING})*[\s,]*\))", re.DOTALL)
"""A list as pandas or NumPy (without commas) writes it, or a tuple, of texts."""
_LIST_BEGINS = re.compile(r"\[\s*[\[(\"'{]|\(\s*[\"'][^\"']*[\"']\s*,.*\)$|array\(\[|\{\s*[\"']", re.DOTALL)
"""How a written list or mapping begins, and no caption."""


class RowProblem(ValueError):
    """An error in one row: a reason code and a detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def malformed(expected: str, cell: Any) -> RowProblem:
    """The error of a cell that is not what was expected."""
    return RowProblem("malformed_row", f"expected {expected}, found {shown(cell)}")


def shown(cell: Any) -> str:
    """A cell, or its beginning, for a message."""
    try:
        return repr(cell)[:60]
    except (RecursionError, ValueError):  # nested without end, or a number of thousands of digits
        return type(cell).__name__


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: also for half of a surrogate pair, which UTF-8 cannot encode, and for what is nested too deep.
    """
    try:
        value = json.loads(text)
        # Bytes may hold it escaped, or encoded as if it were a character: then they have an ED.
        if (b"\\u" in text or b"\xed" in text) if isinstance(text, bytes) else "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def is_empty(cell: Any) -> bool:
    """True for a cell without content: null, NaN of parquet, or text that cannot be seen."""
    return cell is None or (isinstance(cell, float) and cell != cell) or (isinstance(cell, str) and is_blank(cell))


def text_of(cell: Any) -> str | None:
    """Text without surrounding blanks; None for an empty cell. A number is its digits; one that is whole has no decimals.

    Where cells are empty, pandas writes a column of whole numbers as floats: 7.0 is the key 7 of another column.
    """
    if isinstance(cell, bytes):
        try:
            cell = cell.decode()
        except UnicodeDecodeError:
            raise malformed("text in UTF-8", cell) from None
    if is_empty(cell):
        return None
    if not isinstance(cell, (str, int, float)):
        raise malformed("text", cell)
    if isinstance(cell, float) and cell.is_integer():
        return f"{cell:.0f}"
    return _trimmed(str(cell))


def captions_of(cell: Any) -> list[str]:
    """The captions in a cell: text, or a list of texts."""
    if is_empty(cell):
        return []
    value = _written_list(cell) if isinstance(cell, str) else cell
    if isinstance(value, (str, int, float, bytes)):
        return [text_of(value) or ""]
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise malformed("text or a list of texts", cell)
    return [_trimmed(item) for item in value]


def split_of(cell: Any) -> str | None:
    """The split that a cell states: train, val or test; None for an empty cell."""
    stated = text_of(cell)
    if stated is not None and stated.lower() not in SPLIT_NAMES:
        raise malformed(f"one of {', '.join(SPLIT_NAMES)}", cell)
    return stated and SPLIT_NAMES[stated.lower()]


def _trimmed(text: str) -> str:
    return text.strip("\ufeff").strip()


def _written_list(text: str) -> Any:
    """The list that a text cell holds as JSON or as Python writes it; the text itself if it is a caption."""
    content = text.strip()
    if content.startswith("["):
        try:
            return parse_json(content)
        except ValueError:
            pass
    if _PYTHON_LIST.fullmatch(content):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # a backslash that escapes nothing
            strings = [ast.literal_eval(string) for string in re.findall(_STRING, content, re.DOTALL)]
        if all(map(is_unicode, strings)):
            return strings
    if _LIST_BEGINS.match(content):
        raise malformed("text or a list of texts", text)
    return text


def structure_of(cell: Any, expected: str) -> Any:
    """A list or mapping: unchanged from parquet and JSON Lines, parsed from a text cell; None for an empty cell."""
    if is_empty(cell):
        return None
    if not isinstance(cell, str):
        return cell
    try:
        return parse_json(cell)
    except ValueError as error:
        raise RowProblem("malformed_row", f"expected {expected}, {error} in {shown(cell)}") from None


def objects_of(cell: Any) -> list[tuple[str, Box]]:
    """Labels and boxes (x0, y0, x1, y1; pixels)."""
    expected = 'a JSON list of {"label": ..., "box": [x0, y0, x1, y1]}'
    objects: list[tuple[str, Box]] = []
    try:
        for item in structure_of(cell, expected) or []:
            x0, y0, x1, y1 = (float(number) for number in item["box"])
            objects.append((_named(item["label"], "name"), (x0, y0, x1, y1)))
    except RowProblem:
        raise
    except (KeyError, TypeError, ValueError, OverflowError):
        raise malformed(expected, cell) from None
    return objects


def questions_of(cell: Any) -> list[tuple[str, list[str]]]:
    """Questions, and the answers that people gave to each."""
    expected = 'a JSON list of {"question": ..., "answers": [...]}'
    questions = []
    try:
        for item in structure_of(cell, expected) or []:
            given = item["answers"] if "answers" in item else item["answer"]
            answers = [_named(answer, "answer") for answer in (given if isinstance(given, list) else [given])]
            if not answers:
                raise RowProblem("malformed_row", f"a question has no answer: {shown(cell)}")
            questions.append((_named(item["question"]), answers))
    except RowProblem:
        raise
    except (KeyError, TypeError):
        raise malformed(expected, cell) from None
    return questions


def reasoning_of(cell: Any) -> list[Problem]:
    """Multiple-choice questions with explanations."""
    expected = (
        'a JSON list of {"question": ..., "options": two or more, "answer": one of them, "explanation": ..., "context": may be left out}'
    )
    problems = []
    try:
        for item in structure_of(cell, expected) or []:
            texts = {name: _named(item[name]) for name in ("question", "answer", "explanation")}
            options = [_named(option) for option in item["options"]]
            if texts["answer"] not in options or len(options) < 2:
                raise ValueError
            problems.append(Problem(options=options, context=text_of(item.get("context")) or "", **texts))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise malformed(expected, cell) from None
    return problems


def _named(value: Any, field: str | None = None) -> str:
    """A text that may not be empty; of a mapping its ``field``, as annotation files have it: ``{"name": "cat", "id": 17}``."""
    text = text_of(value.get(field) if field and isinstance(value, dict) else value)
    if text is None:
        raise malformed("text", value)
    return text
