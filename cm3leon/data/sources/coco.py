"""The COCO source: captions and boxes of annotation files in COCO's format (cocodataset.org/#format-data).

``images`` of all files are joined by ``id``; ``annotations`` with a ``caption`` are captions, those with a ``bbox`` (x, y, width, height)
objects, labeled by ``categories``. A license is that of the file's ``licenses``, and the author's page, as far as it is given, the
attribution. Each file is held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cm3leon.config.schema import CocoConfig
from cm3leon.data.cells import parse_json
from cm3leon.data.manifest import SourceRow
from cm3leon.data.sources import SourceError
from cm3leon.data.sources.records import Cells, Files, row_of


def rows(config: CocoConfig, path: Path) -> Iterator[SourceRow]:
    """Every image of the annotation files, in their order.

    Raises:
        SourceError: if a file is missing, damaged, or lacks a part of the format.
    """
    records: dict[Any, dict[str, Any]] = {}  # by the image's id
    for name in config.annotations:
        content = _read(path / name)
        licenses = {item.get("id"): item.get("url") or item.get("name") for item in content.get("licenses", [])}
        labels = {item["id"]: item["name"] for item in content.get("categories", [])}
        for image in content["images"]:
            author = image.get("flickr_url") or image.get("coco_url")
            found = {"file_name": image["file_name"], "licence": licenses.get(image.get("license")), "attribution": author}
            records.setdefault(image["id"], {**found, "captions": [], "objects": [], "origin": f"{name} image {image['id']}"})
        for number, item in enumerate(content["annotations"]):
            record = records.get(item.get("image_id"))
            if record is None:
                raise SourceError(f"{path / name}: annotation {number} names image {item.get('image_id')!r}, which no file lists")
            if "caption" in item:
                record["captions"].append(item["caption"])
            if "bbox" in item:
                record["objects"].append({"label": labels.get(item.get("category_id")), "box": _corners(item["bbox"])})
    files = Files(path.resolve(), config.max_file_megabytes)
    for record in records.values():
        values = {name: record[name] for name in ("licence", "attribution", "captions", "objects")}
        image = Path(config.images, str(record["file_name"])).as_posix()
        yield row_of(Cells({**values, "image": image}, record["origin"], None), files, config)


def _read(path: Path) -> dict[str, Any]:
    """An annotation file with the parts that are needed."""
    if not path.is_file():
        raise SourceError(f"{path} does not exist; ingest.coco.annotations names annotation files, relative to ingest.path")
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise SourceError(f"{path} is not JSON ({error}); download it again") from None
    missing = [name for name in ("images", "annotations") if not isinstance(content, dict) or not isinstance(content.get(name), list)]
    if missing:
        raise SourceError(f"{path} is no annotation file of COCO: it has no list {' and no list '.join(map(repr, missing))}")
    if not all(isinstance(image, dict) and {"id", "file_name"} <= image.keys() for image in content["images"]):
        raise SourceError(f"{path}: an entry of 'images' has no 'id' or no 'file_name'")
    found: dict[str, Any] = content
    return found


def _corners(box: Any) -> Any:
    """x0, y0, x1, y1 of a box x, y, width, height; anything else as it is, for the row to be at fault."""
    if isinstance(box, list) and len(box) == 4 and all(isinstance(number, (int, float)) for number in box):
        return [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    return box
