"""Stanford Image Paragraphs (cs.stanford.edu/people/ranjaykrishna/im2p): a JSON list with a paragraph about an image of Visual Genome each.

    [{"url": "https://cs.stanford.edu/people/rak248/VG_100K/2356347.jpg", "image_id": 2356347, "paragraph": "A large building ..."}, ...]

The paragraph becomes the ``long_caption`` and its first sentence the caption. Of an image with several paragraphs, the first is the
``long_caption``. The file is held in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from cm3leon.config.ingest_schema import ImageParagraphsConfig
from cm3leon.data.cells import text_of
from cm3leon.data.manifest import SourceRow
from cm3leon.data.sources.image_paths import image_path
from cm3leon.data.sources.json_files import entries, load_json
from cm3leon.data.sources.records import Cells, Files, row_of

SENTENCE = re.compile(r".*?[.!?](?=\s|$)", re.DOTALL)


def rows(config: ImageParagraphsConfig, path: Path) -> Iterator[SourceRow]:
    """A record for each image, in the order of the file.

    Raises:
        SourceError: if the file is missing, damaged, or lacks a field.
    """
    content = load_json(path / config.annotations, "ingest.image_paragraphs.annotations")
    paragraphs: dict[str, list[object]] = {}
    for item in entries(content, str(path / config.annotations), ["image_id"], ["paragraph"]):
        paragraphs.setdefault(str(item["image_id"]), []).append(item["paragraph"])
    files = Files(path.resolve(), config.max_file_megabytes)
    for image, texts in paragraphs.items():
        captions = [first_sentence(text) if isinstance(text, str) else text for text in texts]
        values = {"image": image_path(config.images, image), "captions": captions, "long_caption": texts[0]}
        yield row_of(Cells(values, f"{config.annotations} image {image}", None), files, config)


def first_sentence(paragraph: str) -> str:
    """A paragraph up to the first period, question or exclamation mark that ends a word; the whole if there is none."""
    text = text_of(paragraph) or ""
    found = SENTENCE.match(text)
    return found.group() if found else text
