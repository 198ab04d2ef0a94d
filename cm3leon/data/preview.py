"""What a source makes of the first records of a collection, shown before anything is written: ``cm3leon ingest --check N``."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from cm3leon.config.ingest_schema import FolderConfig, IngestConfig
from cm3leon.config.section import Section
from cm3leon.data.data_report import tasks_allowed, unused_kinds
from cm3leon.data.images import MAX_PIXELS, ImageError, decode, fit_square
from cm3leon.data.manifest import SourceRow
from cm3leon.data.sources import folder, mixture
from cm3leon.data.sources.mixture import Sources
from cm3leon.data.validation import RULES

EXAMPLES = 3
CELLS = 12
"""Width and height of a thumbnail; a character is two cells high."""
SHOWN_CHARACTERS = 200
FIELDS = (
    "captions", "licence", "attribution", "source", "key", "group", "long_caption", "objects", "questions", "reasoning", "instruction",
    "edited_from", "text_in_image", "split",
)  # fmt: skip


def show_collection(config: IngestConfig, sources: Sources, count: int, console: Console) -> None:
    """Print what is made of the first ``count`` records of the source, of a mixture those of each part: see :func:`show`.

    Raises:
        SourceError: if a collection cannot be read as configured.
    """
    root = Path(config.path)
    if config.source != "mixture":
        options = getattr(config, config.source)
        show(list(itertools.islice(sources[config.source](options, root), count)), _mapping(options, root), console)
        return
    for number, part in enumerate(config.mixture):
        found = list(itertools.islice(mixture.rows_of_part(config.mixture, number, root, sources), count))
        place = root / part.path
        console.print(Text(f"\nmixture.{number}: {part.source} in {place}, weight {part.weight:g}", style="bold"))
        show(found, _mapping(config.options_of(part), place), console)


def _mapping(options: Section, path: Path) -> dict[str, str]:
    """Our column -> the file's, of the source with a manifest."""
    return folder.mapping_of(options, path) if isinstance(options, FolderConfig) else {}


def show(rows: Sequence[SourceRow], mapping: dict[str, str], console: Console) -> None:
    """Print how columns were understood, the tasks that the records allow, the problems found, and examples with thumbnails.

    Args:
        mapping: our column -> the file's, for sources that have columns.
    """
    merged = sum(len(row.other_keys) for row in rows)
    console.print(f"{len(rows):,} records read, nothing written" + (f"; {merged:,} rows more were merged into them" if merged else ""))
    filled = {name: sum(bool(getattr(row, name)) for row in rows) for name in ("image", *FIELDS, "conditions")}
    table = Table("column", "read from", "records that have it")
    for name, count in filled.items():
        theirs = mapping.get(name, "")
        if count or theirs:
            table.add_row(name, Text(theirs), f"{count:,}")  # no markup: names may have brackets
    console.print(table)
    tasks = Table("task", "records that allow it")
    counts, unused = tasks_allowed({**vars(row), "conditions": list(row.conditions)} for row in rows if not row.problem)
    for name, count in counts.items():
        tasks.add_row(name, f"{count:,}")
    console.print(tasks)
    if unused:
        console.print(Text(unused_kinds(unused)))
    reasons = Counter(reason for row in rows for reason in (row.problem or "").split(",") if reason)
    if reasons:
        problems = Table("problem", "records", "what to do", "first")
        for reason, count in reasons.most_common():
            first = next(row for row in rows if reason in (row.problem or "").split(","))
            problems.add_row(reason, f"{count:,}", RULES.get(reason, "found by the source"), Text(f"{first.origin}: {first.detail}"))
        console.print(problems)
    for row in [row for row in rows if row.image and not row.problem][:EXAMPLES]:
        console.print(_example(row))


def _example(row: SourceRow) -> Group:
    lines = [f"{name}: {str(getattr(row, name))[:SHOWN_CHARACTERS]}" for name in FIELDS if getattr(row, name)]
    if row.conditions:
        lines.append(f"conditions: {', '.join(row.conditions)}")
    table = Table.grid(padding=(0, 2))
    table.add_row(_thumbnail(row.image or b""), Text("\n".join(lines)))
    return Group(Text(f"\n{row.origin}"), table)


def _thumbnail(data: bytes) -> Text:
    """A picture in characters, each of which is an upper and a lower cell."""
    try:
        small = fit_square(decode(data, MAX_PIXELS), CELLS)
    except ImageError as error:
        return Text(str(error)[:SHOWN_CHARACTERS])
    text = Text()
    for y in range(0, CELLS, 2):
        for x in range(CELLS):
            above, below = (small.getpixel((x, y + step)) for step in (0, 1))
            text.append("\u2580", f"rgb{above} on rgb{below}".replace(" ", "").replace("onrgb", " on rgb"))
        text.append("\n")
    return text
