"""The COCO source: annotation files in COCO's format (cocodataset.org/#format-data), of COCO and of others, such as Objects365.

``images`` of all files are joined by ``id``; ``annotations`` with a ``caption`` are captions, those with a ``bbox`` (x, y, width, height)
objects, labeled by ``categories``, and of those with ``segments_info`` (panoptic) the PNG becomes the condition ``segmentation map``. A
license is that of the file's ``licenses``, and the author's page, as far as it is given, the attribution. Each file is held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cm3leon.config.ingest_schema import CocoConfig
from cm3leon.data.cells import RowProblem, malformed
from cm3leon.data.manifest import SourceRow
from cm3leon.data.segmentation import SEGMENTATION_MAP, segmentation_map
from cm3leon.data.sources import SourceError
from cm3leon.data.sources.json_files import entries, load_json
from cm3leon.data.sources.records import Cells, Files, add_problems, row_of


def rows(config: CocoConfig, path: Path) -> Iterator[SourceRow]:
    """Every image of the annotation files, in their order.

    Problems found here: ``missing`` or ``unreadable_condition`` (the PNG of a panoptic annotation), ``malformed_row`` (a segment or a box
    has no category that is listed).

    Raises:
        SourceError: if a file is missing, damaged, or lacks a part of the format.
    """
    records: dict[Any, dict[str, Any]] = {}  # by the image's id
    for name in config.annotations:
        content = _read(path / name)
        licenses = {item["id"]: item.get("url") or item.get("name") for item in content["licenses"]}
        labels = {item["id"]: item["name"] for item in content["categories"]}
        for image in content["images"]:
            author = image.get("flickr_url") or image.get("coco_url")
            found = {"file_name": image["file_name"], "licence": _known(licenses, image.get("license")), "attribution": author}
            new = {**found, "captions": [], "objects": [], "origin": f"{name} image {image['id']}"}
            known = records.setdefault(image["id"], new)
            for column in ("licence", "attribution"):  # a file of boxes may state none, and that of the captions does
                known[column] = known[column] or found[column]
            if known["file_name"] != image["file_name"]:
                raise SourceError(
                    f"{path / name}: image {image['id']!r} is {image['file_name']!r}, and {known['file_name']!r} is {known['origin']}: "
                    "number the images of these files differently, or read each file as a part of ingest.source: mixture"
                )
        for number, item in enumerate(content["annotations"]):
            record = records.get(item["image_id"])
            if record is None:
                raise SourceError(f"{path / name}: annotation {number} names image {item['image_id']!r}, which no file lists")
            if "caption" in item:
                record["captions"].append(item["caption"])
            if "bbox" in item:
                category = item.get("category_id")
                label = _known(labels, category) or {"category_id": category}  # for the message, if it is not listed
                record["objects"].append({"label": label, "box": _corners(item["bbox"])})
            if "segments_info" in item:
                record["panoptic"] = (item.get("file_name"), item["segments_info"], labels)
    files = Files(path.resolve(), config.max_file_megabytes)
    for record in records.values():
        values = {name: record[name] for name in ("licence", "attribution", "captions", "objects")}
        image = Path(config.images, str(record["file_name"])).as_posix()
        row = row_of(Cells({**values, "image": image}, record["origin"], None), files, config)
        if "panoptic" in record:
            name, segments, labels = record["panoptic"]
            try:
                row.conditions[SEGMENTATION_MAP] = _segmentation(name, segments, labels, config, files)
            except RowProblem as problem:
                add_problems(row, [problem])
        yield row


def _read(path: Path) -> dict[str, Any]:
    """An annotation file with the parts that are needed."""
    content = load_json(path, "ingest.coco.annotations")
    missing = [name for name in ("images", "annotations") if not isinstance(content, dict) or not isinstance(content.get(name), list)]
    if missing:
        raise SourceError(f"{path} is no annotation file of COCO: it has no list {' and no list '.join(map(repr, missing))}")
    names = {"images": ("id", "file_name"), "annotations": ("image_id",), "licenses": ("id",), "categories": ("id", "name")}
    return {name: entries(content.get(name) or [], f"{path}: {name!r}", needed) for name, needed in names.items()}


def _known(table: Mapping[Any, Any], key: Any) -> Any:
    """What a table has for an id; None if it has none, as for a list in its place."""
    return table.get(key) if isinstance(key, (int, str)) else None


def _corners(box: Any) -> Any:
    """x0, y0, x1, y1 of a box x, y, width, height; anything else as it is, for the row to be at fault."""
    if isinstance(box, list) and len(box) == 4 and all(isinstance(number, (int, float)) for number in box):
        return [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    return box


def _segmentation(name: Any, segments: Any, labels: Mapping[Any, str], config: CocoConfig, files: Files) -> bytes:
    """The segmentation map of a panoptic annotation: its PNG, and the category of each segment."""
    try:
        categories = {int(segment["id"]): labels[segment["category_id"]] for segment in segments}
    except (KeyError, TypeError, ValueError):
        raise malformed('segments_info with "id" and a "category_id" that is listed', segments) from None
    if not isinstance(name, str):
        raise malformed('a "file_name" of the panoptic PNG', name)
    return segmentation_map(files.read(Path(config.panoptic, name).as_posix()), categories)
