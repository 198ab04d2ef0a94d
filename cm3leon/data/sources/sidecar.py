"""The sidecar source: a directory of images with a text file of captions beside each, one caption a line: ``a/1.png``, ``a/1.txt``.

A JSON file of the same name may have other columns, called as ours are or mapped in ``ingest.sidecar.columns``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cm3leon.config.ingest_schema import SidecarConfig
from cm3leon.data.cells import parse_json
from cm3leon.data.directories import files_below
from cm3leon.data.images import SUFFIXES
from cm3leon.data.manifest import SourceRow
from cm3leon.data.sources import SourceError
from cm3leon.data.sources.records import Cells, Columns, Files, row_of


def rows(config: SidecarConfig, path: Path) -> Iterator[SourceRow]:
    """Every image under ``path``, in the order of names; one without a text file has no caption.

    Raises:
        SourceError: if there are no images, or a column is mapped that there is not.
        UserError: if a directory cannot be read, or is a link that leads out of ``path``.
    """
    columns = Columns(config.columns, "ingest.sidecar")
    images = [file for file in files_below(path) if file.suffix.lower() in SUFFIXES]
    if not images:
        raise SourceError(f"{path} holds no images ({', '.join(SUFFIXES)}); ingest.path names their directory")
    files = Files(path.resolve(), config.max_file_megabytes)
    for image in images:
        values, fault = _beside(image, columns)
        name = image.relative_to(path).as_posix()
        yield row_of(Cells({**values, "image": name}, name, fault), files, config)
    columns.tell_unseen()


def _beside(image: Path, columns: Columns) -> tuple[dict[str, Any], str | None]:
    """The cells from the files beside an image, and what is wrong with these."""
    text, fields = image.with_suffix(".txt"), image.with_suffix(".json")
    values: dict[str, Any] = {}
    try:
        if fields.is_file():
            found = parse_json(fields.read_bytes())
            if not isinstance(found, dict):
                return {}, f"{fields.name} holds no object"
            values = columns.mapped(found)
        if text.is_file():
            lines = text.read_text(encoding="utf-8-sig").splitlines()
            values["captions"] = [line for line in lines if line.strip()]
    except (ValueError, OSError) as error:
        return {}, f"{fields.name} or {text.name}: {error}"
    return values, None
