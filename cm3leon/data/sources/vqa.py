"""Questions and answers about images: VQA v2 and OK-VQA (visualqa.org, okvqa.allenai.org), and VizWiz (vizwiz.org).

VQA v2 and OK-VQA have two files, which are joined by ``question_id``::

    {"questions": [{"question_id": 458752000, "image_id": 458752, "question": "What is this photo taken looking through?"}, ...]}
    {"annotations": [{"question_id": 458752000, "image_id": 458752, "answers": [{"answer": "net", "answer_id": 1, ...}, ...]}, ...]}

VizWiz has one, in which ``image`` is the file's name (``annotations: null``, ``images: images/{image_id}``)::

    [{"image": "VizWiz_train_00000000.jpg", "question": "What's the name of this product?", "answers": [{"answer": "basil"}, ...]}, ...]

The records have no captions: they are for a mixture with a source of captions of the same images. The files are held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cm3leon.config.ingest_schema import VqaConfig
from cm3leon.data.cells import is_empty
from cm3leon.data.manifest import SourceRow
from cm3leon.data.sources import SourceError, tell
from cm3leon.data.sources.image_paths import image_path
from cm3leon.data.sources.json_files import entries, load_json
from cm3leon.data.sources.records import Cells, Files, row_of


class Asked(NamedTuple):
    """A question about an image, and the answers that people gave: none in test sets."""

    image_id: int | str
    question: Any
    answers: list[Any]


def rows(config: VqaConfig, path: Path) -> Iterator[SourceRow]:
    """A record for each image, with all its questions that have an answer. How many have none is told.

    Raises:
        SourceError: if a file is missing, damaged, or lacks a field, or no question has an answer.
    """
    asked = _two_files(config, path) if config.annotations else _one_file(config, path)
    answered = [item for item in asked if item.answers]
    if not answered:
        raise SourceError(f"{path / config.questions}: none of {len(asked)} questions has an answer; those of test sets are not published")
    if len(answered) < len(asked):
        tell(f"{path / config.questions}: {len(asked) - len(answered):,} of {len(asked):,} questions have no answer and are left out")
    questions: dict[int | str, list[dict[str, Any]]] = {}
    for item in answered:
        questions.setdefault(item.image_id, []).append({"question": item.question, "answers": item.answers})
    files = Files(path.resolve(), config.max_file_megabytes)
    for image, about_it in questions.items():
        values = {"image": image_path(config.images, image), "questions": about_it}
        yield row_of(Cells(values, f"{config.questions} image {image}", None), files, config)


def _two_files(config: VqaConfig, path: Path) -> list[Asked]:
    questions = load_json(path / config.questions, "ingest.vqa.questions")
    if isinstance(questions, list):
        raise SourceError(
            f"{path / config.questions} is a list, as VizWiz has it: set ingest.vqa.annotations to null, and images to images/{{image_id}}"
        )
    file = path / str(config.annotations)
    given = _listed(load_json(file, "ingest.vqa.annotations"), file, "annotations", ["question_id"], "answers")
    answers = {item["question_id"]: _answers(item["answers"]) for item in given}
    asked = _listed(questions, path / config.questions, "questions", ["question_id", "image_id"], "question")
    return [Asked(item["image_id"], item["question"], answers.get(item["question_id"], [])) for item in asked]


def _listed(content: Any, path: Path, name: str, names: list[str], field: str) -> list[dict[str, Any]]:
    """The list ``name`` of a file, whose entries have ``names`` and ``field``."""
    if not isinstance(content, dict) or name not in content:
        raise SourceError(f"{path} has no list {name!r}, as VQA v2 has it")
    return entries(content[name], f"{path}: {name!r}", names, [field])


def _one_file(config: VqaConfig, path: Path) -> list[Asked]:
    file = path / config.questions
    found = entries(load_json(file, "ingest.vqa.questions"), str(file), ["image"], ["question"])
    return [Asked(str(item["image"]), item["question"], _answers(item.get("answers"))) for item in found]


def _answers(found: Any) -> list[Any]:
    """The answers that say something, as they are: ``questions_of`` reads them."""
    given = found if isinstance(found, list) else [] if is_empty(found) else [found]
    return [answer for answer in given if not is_empty(answer.get("answer", answer) if isinstance(answer, dict) else answer)]
