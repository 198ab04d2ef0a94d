"""``ingest``: reads a source and writes image shards and one manifest to ``data/raw/``."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cm3leon.config import paths
from cm3leon.config.ingest_schema import IngestConfig
from cm3leon.config.schema import Config
from cm3leon.data.images import MAX_PIXELS, ImageError, decode, encode
from cm3leon.data.manifest import SourceRow
from cm3leon.data.packing import pack
from cm3leon.data.sources import (
    coco,
    folder,
    image_paragraphs,
    instruct_pix2pix,
    localized_narratives,
    mixture,
    open_images,
    scienceqa,
    sidecar,
    vqa,
    webdataset,
)
from cm3leon.scenes import source as shapes
from cm3leon.tracking import runs
from cm3leon.utils.progress import track
from cm3leon.utils.texts import as_unicode

SOURCES: dict[str, Callable[[Any, Path], Iterator[SourceRow]]] = {
    "shapes": shapes.rows,
    "folder": folder.rows,
    "webdataset": webdataset.rows,
    "sidecar": sidecar.rows,
    "coco": coco.rows,
    "localized_narratives": localized_narratives.rows,
    "image_paragraphs": image_paragraphs.rows,
    "vqa": vqa.rows,
    "scienceqa": scienceqa.rows,
    "open_images": open_images.rows,
    "instruct_pix2pix": instruct_pix2pix.rows,
}
"""The sources of one collection by name; the section ``ingest.NAME`` has the parameters of each."""
EXTRACTED_SIDE = 512
"""Condition images are computed from images reduced to at most this side, pixels."""


def with_conditions(rows: Iterable[SourceRow], kinds: Sequence[str], share: float) -> Iterator[SourceRow]:
    """The rows, of which a share gets condition images computed from their images, as far as the source has none.

    The random choice depends on the row's key only, so that it does not change when rows are added.
    """
    from cm3leon.data.conditions import EXTRACTORS

    for row in rows:
        missing = [kind for kind in kinds if kind not in row.conditions]
        if missing and row.image is not None and random.Random(as_unicode(row.key)).random() < share:
            try:
                image = decode(row.image, MAX_PIXELS)
            except ImageError:
                missing = []  # validate says what is wrong with the image
            else:
                image.thumbnail((EXTRACTED_SIDE, EXTRACTED_SIDE))
            row.conditions |= {kind: encode(EXTRACTORS[kind](np.asarray(image))) for kind in missing}
        yield row


def source_rows(config: IngestConfig) -> Iterator[SourceRow]:
    """The rows of the source ``config.source``.

    Raises:
        SourceError: if the collection cannot be read as configured.
    """
    if config.source == "mixture":
        return mixture.rows(config.mixture, Path(config.path), SOURCES)
    return SOURCES[config.source](getattr(config, config.source), Path(config.path))


def run(config: Config) -> dict[str, float]:
    """Read the source ``ingest.source`` and pack it; returns counts (rows, images, problems, shards, megabytes).

    Raises:
        SourceError: if the collection cannot be read as configured. An error in a single row is recorded as its problem instead.
    """
    with runs.stage_run("ingest", config) as stage:
        extended = with_conditions(source_rows(config.ingest), config.ingest.extract, config.ingest.extract_share)
        rows = track(extended, f"ingest: {config.ingest.source}", _expected(config), "rows")
        metrics = pack(rows, paths.RAW, config.ingest.shard_megabytes)
        stage.log_metrics({f"ingest/{name}": value for name, value in metrics.items()})
    table = Table("metric", "count", title=f"ingest from {config.ingest.source}, in {paths.RAW}")
    for name, value in metrics.items():
        table.add_row(name, f"{value:,}")
    Console().print(table)
    return metrics


def _expected(config: Config) -> int | None:
    """The number of rows, if it is known before they are read."""
    return config.ingest.shapes.count if config.ingest.source == "shapes" and not config.ingest.shapes.edits else None
