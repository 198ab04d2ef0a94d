"""``ingest``: any source into image shards and one manifest, ``data/raw/``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from cm3leon import paths, tracking
from cm3leon.config import Config
from cm3leon.data.packing import pack
from cm3leon.data.sources import source_rows
from cm3leon.progress import track


def run(config: Config) -> dict[str, float]:
    """Read the source ``ingest.source`` and pack it; returns counts (rows, images, problems, shards, megabytes).

    Raises:
        SourceError: if the collection cannot be read as configured. A single row at fault is no error: it is kept with its problem.
    """
    with tracking.stage_run("ingest", config) as stage:
        rows = track(source_rows(config.ingest), f"ingest: {config.ingest.source}", _expected(config), "rows")
        figures = pack(rows, paths.RAW, config.ingest.shard_megabytes)
        stage.log_metrics({f"ingest/{name}": value for name, value in figures.items()})
    table = Table("figure", "value", title=f"ingest from {config.ingest.source}, in {paths.RAW}")
    for name, value in figures.items():
        table.add_row(name, f"{value:,}")
    Console().print(table)
    return figures


def _expected(config: Config) -> int | None:
    """Rows to come, where that is known."""
    return config.ingest.shapes.count if config.ingest.source == "shapes" and not config.ingest.shapes.edits else None
