"""Instruction-tuning tasks and their templates (paper, Table 5).

Text comes before the image in every template, so an answer is produced by infilling: it is masked where it stands and moved behind the
image, ``instruction <mask:0> <break> image <mask:0> answer <eoss>``. A training sample may ask several questions about its image,
each with a mask of its own; at inference there is one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.documents import Tokens, Vocabulary
from cm3leon.tokenizers.text import TextTokenizer

ANSWER = "{answer}"

Segment = tuple[str, Tokens]
"""Modality, ``text`` or ``image``, and token ids."""


@dataclass(frozen=True)
class Task:
    """A task: the manifest column it needs and its text templates.

    A template that holds ``{answer}`` is answered by infilling; one without it is answered by the image that follows. Other fields in
    braces are filled from the row. The first template is the one used at inference.
    """

    column: str
    templates: tuple[str, ...]

    @property
    def draws(self) -> bool:
        """Whether the image, not a text, is what the task produces."""
        return ANSWER not in self.templates[0]


TASKS: dict[str, Task] = {
    "text_to_image": Task("captions", ("{caption}",)),
    "write": Task("text_in_image", ('draw "{text}"',)),
    "caption": Task("captions", ("{answer}", "Describe the given picture. {answer}")),
    "long_caption": Task(
        "long_caption",
        ("Describe the given picture in very detail. {answer}", "Describe the given picture in every detail. {answer}"),
    ),
    "vqa": Task(
        "questions",
        ("Question: {question} Answer: {answer}.", "Question: {question}\n{answer}", "Question: {question} The answer is {answer}."),
    ),
}


def available(row: Mapping[str, Any]) -> list[str]:
    """Names of the tasks for which a manifest row has the column."""

    def filled(value: Any) -> bool:
        return value is not None and (len(value) > 0 if hasattr(value, "__len__") else value == value)

    return [name for name, task in TASKS.items() if filled(row.get(task.column))]


def turns(name: str, row: Mapping[str, Any], rng: np.random.Generator, most_questions: int = 1) -> list[dict[str, str]]:
    """What fills a task's template, drawn from a row: a caption of several, or one to ``most_questions`` different questions."""
    if name == "text_to_image":
        return [{"caption": str(rng.choice(row["captions"]))}]
    if name == "write":
        return [{"text": str(row["text_in_image"])}]
    if name == "caption":
        return [{"answer": str(rng.choice(row["captions"]))}]
    if name == "long_caption":
        return [{"answer": str(row["long_caption"])}]
    asked = rng.permutation(len(row["questions"]))[: int(rng.integers(1, most_questions + 1))]
    chosen = [row["questions"][int(number)] for number in asked]
    return [{"question": item["question"], "answer": str(rng.choice(item["answers"]))} for item in chosen]


def split_template(template: str, values: Mapping[str, str]) -> tuple[str, str, str]:
    """Text before the answer, the answer with the blank before it, text after; the answer is empty where the template has none."""
    before, marker, after = template.partition(ANSWER)
    given = {k: v for k, v in values.items() if k != "answer"}
    if not marker:
        return before.format(**given), "", ""
    blank = " " if before.endswith(" ") else ""
    return before.removesuffix(" ").format(**given), blank + values.get("answer", ""), after.format(**given)


def lay_out(
    template: str, asked: Sequence[Mapping[str, str]], codes: np.ndarray, vocabulary: Vocabulary, tokenizer: TextTokenizer
) -> tuple[list[tuple[str, Tokens]], list[tuple[int, int]]]:
    """Segments of a sample, and where the answers stand in its text (none where the image is the answer).

    Several turns, all about one image, stand on a line each.
    """
    pieces: list[Tokens] = []
    answers: list[tuple[int, int]] = []
    for number, values in enumerate(asked):
        before, answer, after = (vocabulary.text(tokenizer.encode(part)) for part in split_template(template, values))
        pieces += [vocabulary.text(tokenizer.encode("\n"))] if number else []
        start = sum(map(len, pieces)) + len(before)
        pieces += [before, answer, after]
        if ANSWER in template:
            answers.append((start, start + len(answer)))
    return [("text", np.concatenate(pieces)), ("image", vocabulary.image(codes))], answers


EDIT = "Edit first image following the instruction"
CONDITIONS = ("canny edge", "segmentation map", "hed", "openpose", "depth", "3D norm", "children's scribbles", "M-LSD lines")
"""What an image can be made from (paper, Table 5)."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, pixels."""


def layout_text(caption: str, objects: Sequence[tuple[str, Box]], size: int) -> str:
    """The text that asks for objects at places; boxes in pixels of a square of ``size``, told as 0 to 255."""
    told = []
    for label, box in objects:
        x0, y0, x1, y1 = (round(value * 255 / size) for value in box)
        told.append(f"{label} at ({x0}, {y0}) -> ({x1}, {y1})")
    return f"Generate high quality image of {caption} with segmentations {', '.join(told)}"


def condition_text(kind: str) -> str:
    """The text before a condition image."""
    return f"Make high quality image from {kind} features"


TRAINING = "training.json"
"""File beside a decoder that says what it was trained for."""


@dataclass(frozen=True)
class Training:
    """What a model was trained for: tasks of instruction tuning, and whether it knows masked prompts, which guidance needs."""

    tasks: frozenset[str]
    masked_prompts: bool

    def write(self, directory: Path) -> None:
        """Write ``training.json`` beside a decoder."""
        (directory / TRAINING).write_text(json.dumps({"tasks": sorted(self.tasks), "masked_prompts": self.masked_prompts}) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Training | None:
        """What :meth:`write` wrote, if it is there."""
        if not (directory / TRAINING).is_file():
            return None
        found = json.loads((directory / TRAINING).read_text())
        return cls(frozenset(found["tasks"]), found["masked_prompts"])
