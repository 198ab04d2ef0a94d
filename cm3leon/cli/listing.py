"""Records on standard output: a table where it fits, else a paragraph for each; tab-separated when piped, for other programs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

MAX_WIDTH = 10_000


def show(records: Sequence[Mapping[str, str]], console: Console | None = None) -> None:
    """Print records of the same columns, at least one; every value is shown whole.

    Args:
        records: column -> text; the first column names the record.
        console: by default standard output.
    """
    console = console or Console()
    if not console.is_terminal:
        for row in (list(records[0]), *(list(record.values()) for record in records)):
            print("\t".join(" ".join(text.split()) for text in row), file=console.file or sys.stdout)
        return
    table = Table(*records[0])
    for record in records:
        table.add_row(*map(Text, record.values()))
    if console.measure(table, options=console.options.update(width=MAX_WIDTH)).maximum <= console.width:
        console.print(table)
    else:
        for record in records:
            _show_paragraph(record, console)


def _show_paragraph(record: Mapping[str, str], console: Console) -> None:
    """The record's name, then its other values that are not empty, each after its column; a line ends between two of them."""
    (column, name), *rest = record.items()
    console.print(f"{column} {name}", style="bold", markup=False, highlight=False)
    line = ""
    for item in (f"{column} {text}" for column, text in rest if text):
        if line and len(line) + 2 + len(item) > console.width - 2:
            console.print(f"  {line}", markup=False, highlight=False)
            line = ""
        line = f"{line}  {item}" if line else item
    console.print(f"  {line}", markup=False, highlight=False)
