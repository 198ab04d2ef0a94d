"""Open Images (storage.googleapis.com/openimages/web): boxes, in CSV files.

    boxes:   ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,...     fractions of the image's width and height
    classes: LabelName,DisplayName                                           files without this header are read too
    images:  ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,...

Boxes become pixels by the size in the header of the image file. The records have no captions: they are for a mixture with a source of
captions of the same images, such as Localized Narratives. The classes and the list of images are held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from cm3leon.config.ingest_schema import OpenImagesConfig
from cm3leon.data.cells import RowProblem
from cm3leon.data.images import ImageError, size_of
from cm3leon.data.manifest import SourceRow
from cm3leon.data.sources import SourceError
from cm3leon.data.sources.image_paths import image_path
from cm3leon.data.sources.json_files import existing
from cm3leon.data.sources.records import Cells, Files, row_of
from cm3leon.data.tables import Row, read_table

BOX = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")
AUTHOR = ("Author", "AuthorProfileURL", "OriginalLandingURL", "OriginalURL")
"""Columns of the list of images of which the first that is filled is the attribution."""


def rows(config: OpenImagesConfig, path: Path) -> Iterator[SourceRow]:
    """A record for each image of the file of boxes, in its order.

    Raises:
        SourceError: if a file is missing, lacks a column, has a line at fault in the list of images, or the boxes of an image do not
            follow one another.
    """
    names = _classes(existing(path / config.classes, "ingest.open_images.classes"))
    stated = _stated(existing(path / config.image_list, "ingest.open_images.image_list")) if config.image_list else {}
    file = existing(path / config.boxes, "ingest.open_images.boxes")
    files = Files(path.resolve(), config.max_file_megabytes)
    done: set[str] = set()
    for image_id, boxes in groupby(_table(file, BOX), key=lambda row: row[1].get("ImageID") or ""):
        if image_id in done:
            raise SourceError(f"{file}: the boxes of {image_id} do not follow one another; sort the file by ImageID")
        done.add(image_id)
        yield row_of(_cells(image_id, list(boxes), names, config, files, stated.get(image_id, {})), files, config)


def _cells(
    image_id: str, boxes: Sequence[Row], names: dict[str, str], config: OpenImagesConfig, files: Files, stated: dict[str, str]
) -> Cells:
    path = image_path(config.images, image_id)
    fault = next((fault for _, _, fault in boxes if fault), None)
    cells: dict[str, Any] = {**stated, "image": path, "key": path}
    try:
        content = files.read(path)
        cells["image"] = {"bytes": content, "path": path}
        width, height = size_of(content)
    except (RowProblem, ImageError):  # row_of finds that the file is missing, and validate that it is damaged
        return Cells(cells, f"{config.boxes} image {image_id}", fault)
    cells["objects"] = [
        {
            "label": names.get(box["LabelName"]) or {"LabelName": box["LabelName"]},  # for the message, if it is no class
            "box": [_pixels(box[name], side) for name, side in (("XMin", width), ("YMin", height), ("XMax", width), ("YMax", height))],
        }
        for _, box, wrong in boxes
        if not wrong
    ]
    return Cells(cells, f"{config.boxes} image {image_id}", fault)


def _pixels(fraction: Any, side: int) -> Any:
    """A fraction of a side, in pixels; the cell as it is if it is no number, for the row to be at fault."""
    try:
        return float(fraction) * side
    except (TypeError, ValueError):
        return fraction


def _table(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a file that has ``columns``."""
    found, table_rows = read_table(path)
    if missing := [name for name in columns if name not in found]:
        raise SourceError(f"{path} has no column {' and no column '.join(map(repr, missing))}; its columns are: {', '.join(found)}")
    return table_rows


def _classes(path: Path) -> dict[str, str]:
    """The display name of each label."""
    first, table_rows = read_table(path)  # the first line is a class, or a header that no label is called like
    pairs = [tuple(first), *(tuple(cells.values()) for _, cells, _ in table_rows)]
    if wrong := next((pair for pair in pairs if len(pair) != 2), None):
        raise SourceError(f"{path} does not have the two columns LabelName and DisplayName in each line: {', '.join(map(str, wrong))}")
    return dict(pairs)


def _stated(path: Path) -> dict[str, dict[str, str]]:
    """License and attribution of each image, as far as the list states them.

    Raises:
        SourceError: if a line has too few or too many cells: an author would be named who is not.
    """
    stated = {}
    for where, cells, fault in _table(path, ("ImageID", "License")):
        if fault:
            raise SourceError(f"{path}, {where}: {fault}; correct it: a comma in a cell asks for quotes around the cell")
        author = next((cells[name] for name in AUTHOR if cells.get(name)), "")
        stated[cells["ImageID"]] = {"licence": cells.get("License", ""), "attribution": author}
    return stated
