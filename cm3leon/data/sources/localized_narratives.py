"""Localized Narratives (google.github.io/localized-narratives): JSON Lines in which each line describes an image.

    {"dataset_id": "mscoco_val2017", "image_id": "137576", "annotator_id": 93, "caption": "In this image ...", ...}

``timed_caption``, ``traces`` and ``voice_recording`` are not used. An image's first narrative becomes its ``long_caption``, and all of them
its captions. The texts are held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cm3leon.config.ingest_schema import LocalizedNarrativesConfig
from cm3leon.data.cells import shown
from cm3leon.data.manifest import SourceRow
from cm3leon.data.sources import SourceError
from cm3leon.data.sources.image_paths import image_path
from cm3leon.data.sources.json_files import existing
from cm3leon.data.sources.records import Cells, Files, row_of
from cm3leon.data.tables import read_table

FIELDS = ("image_id", "caption")


def rows(config: LocalizedNarrativesConfig, path: Path) -> Iterator[SourceRow]:
    """A record for each image of the annotation files, in the order of its first narrative, after those for lines that are at fault.

    Raises:
        SourceError: if a file is missing, is not JSON Lines, or no line has a field that is needed.
    """
    files = Files(path.resolve(), config.max_file_megabytes)
    narratives: dict[str, list[str]] = {}  # by the image's id
    origins: dict[str, str] = {}
    for name in config.annotations:
        file = existing(path / name, "ingest.localized_narratives.annotations")
        found, lines = read_table(file)
        if missing := [field for field in FIELDS if field not in found]:
            raise SourceError(f"{file} has no field {' and no field '.join(map(repr, missing))}; its fields are: {', '.join(found)}")
        for where, cells, fault in lines:
            image_id, caption = (cells.get(field) for field in FIELDS)
            if fault or not isinstance(image_id, (str, int)) or not isinstance(caption, str):
                wrong = fault or f"expected an image_id and a caption, found {shown(image_id)} and {shown(caption)}"
                yield row_of(Cells({}, f"{name} {where}", wrong), files, config)
                continue
            narratives.setdefault(str(image_id), []).append(caption)
            origins.setdefault(str(image_id), f"{name} {where}")
    for image, texts in narratives.items():
        values = {"image": image_path(config.images, image), "captions": texts, "long_caption": texts[0]}
        yield row_of(Cells(values, origins[image], None), files, config)
