"""ScienceQA (scienceqa.github.io): multiple-choice questions about pictures, with the lecture and the solution that explain the answer.

    problems.json: {"1": {"question": ..., "choices": [...], "answer": 0, "hint": ..., "image": "image.png" or null, "lecture": ...,
                          "solution": ..., "split": "train", ...}, ...}
    captions.json: {"captions": {"1": "a map of the United States", ...}}
    images/train/1/image.png

Each picture becomes a record with all its problems as ``reasoning``: lecture and solution are the explanation, and the hint the context.
Problems without a picture, or without an explanation, are left out. The files are held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cm3leon.config.ingest_schema import ScienceQAConfig
from cm3leon.data.cells import is_empty
from cm3leon.data.manifest import SourceRow
from cm3leon.data.merging import merge_images
from cm3leon.data.sources import SourceError, tell
from cm3leon.data.sources.json_files import entries, load_json
from cm3leon.data.sources.records import Cells, Files, row_of

FIELDS = ("question", "choices", "answer", "image")


def rows(config: ScienceQAConfig, path: Path) -> Iterator[SourceRow]:
    """A record for each picture; many show in several problems. How many problems are left out is told.

    Raises:
        SourceError: if a file is missing, damaged, or lacks a field, or no problem has a picture and an explanation.
    """
    file = path / config.problems
    content = load_json(file, "ingest.scienceqa.problems")
    if not isinstance(content, dict):
        raise SourceError(f"{file} is no map of a problem's number to the problem")
    entries(list(content.values()), str(file), ["split"], FIELDS)
    captions = _captions(path / config.captions) if config.captions else {}
    pictured = {number: item for number, item in content.items() if not is_empty(item["image"])}
    explained = {number: item for number, item in pictured.items() if _explanation(item)}
    if not explained:
        raise SourceError(f"{file}: none of {len(content):,} problems has an image and a lecture or solution")
    if len(explained) < len(content):
        tell(
            f"{file}: of {len(content):,} problems {len(content) - len(pictured):,} have no image "
            f"and {len(pictured) - len(explained):,} more neither lecture nor solution; they are left out"
        )
    files = Files(path.resolve(), config.max_file_megabytes)

    def read() -> Iterator[SourceRow]:
        for number, item in explained.items():
            image = Path(config.images, str(item["split"]), number, str(item["image"])).as_posix()
            values = {"image": image, "captions": captions.get(number), "reasoning": [_reasoning(item)]}
            yield row_of(Cells(values, f"{config.problems} problem {number}", None), files, config)

    yield from merge_images(read)


def _captions(path: Path) -> dict[str, Any]:
    content = load_json(path, "ingest.scienceqa.captions")
    if not isinstance(content, dict) or not isinstance(content.get("captions"), dict):
        raise SourceError(f"{path} has no map 'captions' of a problem's number to a caption")
    found: dict[str, Any] = content["captions"]
    return found


def _explanation(item: dict[str, Any]) -> str:
    """Lecture and solution, as far as they are texts."""
    return "\n".join(text.strip() for text in (item.get("lecture"), item.get("solution")) if isinstance(text, str) and not is_empty(text))


def _reasoning(item: dict[str, Any]) -> dict[str, Any]:
    """The cell that ``reasoning_of`` reads; without an answer if the number of the right choice is none."""
    choices, right = item["choices"], item["answer"]
    known = isinstance(choices, list) and isinstance(right, int) and 0 <= right < len(choices)
    return {
        "question": item["question"],
        "options": choices,
        "answer": choices[right] if known else None,
        "explanation": _explanation(item),
        "context": item.get("hint"),
    }
