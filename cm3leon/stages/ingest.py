"""``ingest``: reads a source and writes image shards and one manifest to ``data/raw/``."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cm3leon.config import paths
from cm3leon.config.ingest_schema import IngestConfig
from cm3leon.config.schema import Config
from cm3leon.data.bounded import bounded_map
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

if TYPE_CHECKING:
    from cm3leon.data.conditions import Extractor

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
EXTRACTION_SECONDS, EXTRACTION_MEGABYTES = 120.0, 4000.0
"""An image that takes more gets none, so that no file stops the stage; its record is otherwise as any."""
CHUNK_ROWS, CHUNK_BYTES = 256, 256 << 20
"""Rows, and bytes of their images, of which condition images are computed at once."""


def with_conditions(rows: Iterable[SourceRow], kinds: Sequence[str], share: float) -> Iterator[SourceRow]:
    """The rows, of which a share gets condition images computed from their images, as far as the source has none.

    They are computed on all cores. The random choice depends on the row's key only, so that it does not change when rows are added.
    """
    if not kinds:
        yield from rows
        return
    from cm3leon.data.conditions import EXTRACTORS  # here, so that each of the processes need not

    extracted = partial(_extracted, {kind: EXTRACTORS[kind] for kind in kinds})
    for chunk in _chunks(rows):
        lacking = {number: [kind for kind in kinds if kind not in row.conditions] for number, row in enumerate(chunk) if row.image}
        chosen = [number for number, missing in lacking.items() if missing and _drawn(chunk[number]) < share]
        items = [(chunk[number].image or b"", lacking[number]) for number in chosen]
        computed = bounded_map(extracted, items, os.cpu_count() or 1, EXTRACTION_SECONDS, EXTRACTION_MEGABYTES)
        for number, done in zip(chosen, computed, strict=True):
            chunk[number].conditions |= done.result or {}
        yield from chunk


def _chunks(rows: Iterable[SourceRow]) -> Iterator[list[SourceRow]]:
    """The rows, some at a time."""
    chunk: list[SourceRow] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row.image or b"")
        if len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _drawn(row: SourceRow) -> float:
    return random.Random(as_unicode(row.key)).random()


def _extracted(extractors: dict[str, Extractor], item: tuple[bytes, list[str]]) -> dict[str, bytes]:
    """Condition images of an image, by kind; none of one that cannot be read: validate says what is wrong with it."""
    data, kinds = item
    try:
        image = decode(data, MAX_PIXELS)
    except ImageError:
        return {}
    image.thumbnail((EXTRACTED_SIDE, EXTRACTED_SIDE))
    return {kind: encode(extractors[kind](np.asarray(image))) for kind in kinds}


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
