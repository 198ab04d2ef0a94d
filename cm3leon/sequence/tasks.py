"""The instruction-tuning tasks (paper, Table 5): their columns, templates, conditioning dropout and score.

A template's segments are separated by ``<break>``. Text comes before the image that it is about, so answers are infilled: an answer is
masked in its place and moved to the end, ``instruction <mask:0> <break> image <mask:0> answer <eoss>``.
A training sample may ask several questions about its image, each with its own mask; at inference there is one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cm3leon.sequence.grammar import Tokens, Vocabulary
from cm3leon.utils.files import read_file, read_json

if TYPE_CHECKING:
    from cm3leon.sequence.text_tokenizer import TextTokenizer

CONDITIONS = ("canny edge", "segmentation map", "hed", "openpose", "depth", "3D norm", "children's scribbles", "M-LSD lines")
"""Kinds of condition images from which models learn to generate (paper, Table 5); a record may have others, which are kept and not used."""
BREAK = " <break> "
IMAGE = "{image}"
"""The record's image; ``{source}`` is the image it was edited from, ``{condition}`` a condition image of it."""
IMAGE_FIELDS = (IMAGE, "{source}", "{condition}")
BLANK = re.compile(r"( ?)\{(answer|explained)\}")
"""The field that is infilled; the space before it belongs to the answer."""

SegmentTokens = tuple[str, Tokens]
"""A segment before it is laid out: modality, ``text`` or ``image``, and token ids."""

Row = Mapping[str, Any]
Fields = dict[str, str]
"""Values of a template's fields: texts, and for images other than the record's own the key of their codes."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def condition_key(name: str, kind: str) -> str:
    """The id under which the codes of a record's condition image are kept."""
    return f"{name}/{kind}"


# --- sampling a template's fields from a manifest row -----------------------------------------------------------------------------------


def _captions(row: Row, rng: np.random.Generator) -> list[Fields]:
    caption = str(rng.choice(row["captions"]))
    return [{"caption": caption, "answer": caption}]


def _written(row: Row, rng: np.random.Generator) -> list[Fields]:
    return [{"text": str(row["text_in_image"])}]


def _long_caption(row: Row, rng: np.random.Generator) -> list[Fields]:
    return [{"answer": str(row["long_caption"])}]


def _questions(row: Row, rng: np.random.Generator) -> list[Fields]:
    chosen = [row["questions"][int(number)] for number in rng.permutation(len(row["questions"]))]
    return [{"question": item["question"], "answer": str(rng.choice(item["answers"]))} for item in chosen]


def _reasoning(row: Row, rng: np.random.Generator) -> list[Fields]:
    item = row["reasoning"][int(rng.integers(len(row["reasoning"])))]
    explained = f"{item['explanation']} {SO_THE_ANSWER_IS} {item['answer']}."
    return [{**reasoning_fields(item["question"], item["options"], item["context"]), "answer": item["answer"], "explained": explained}]


def _layout(row: Row, rng: np.random.Generator) -> list[Fields]:
    return [{**_captions(row, rng)[0], "layout": layout_text(visible_objects(row))}]


def _condition(row: Row, rng: np.random.Generator) -> list[Fields]:
    known = [item["kind"] for item in row["conditions"] if item["kind"] in CONDITIONS]
    kinds = [known[int(number)] for number in rng.permutation(len(known))]
    return [{**_captions(row, rng)[0], "kind": kind, "condition": condition_key(row["id"], kind)} for kind in kinds]


def _edit(row: Row, rng: np.random.Generator) -> list[Fields]:
    return [{"instruction": str(row["instruction"]), "source": str(row["edited_from"])}]


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        columns: manifest columns that a record must have filled.
        templates: one is sampled in training; the first is used at inference.
        sample_fields: samples the template's fields from a manifest row, in random order; several only where a sample may ask several
            questions or where a choice may turn out to be missing.
        score: the task's main score in the evaluation record.
        cfg_dropout: groups of segments that are masked in some samples (conditioning dropout). Each gives guidance one of its
            unconditional streams; the first is also what reranking scores: how likely the result makes what was asked.
    """

    columns: tuple[str, ...]
    templates: tuple[str, ...]
    sample_fields: Callable[[Row, np.random.Generator], list[Fields]]
    score: str
    cfg_dropout: tuple[tuple[int, ...], ...] = ()

    @property
    def generates_image(self) -> bool:
        """True if the task's result is an image, False if it is text."""
        return not BLANK.search(self.templates[0])

    @property
    def sees_image(self) -> bool:
        """True if the task generates an image from another image."""
        return self.generates_image and any(field in self.templates[0] for field in IMAGE_FIELDS[1:])


_ASKED = "Question: {question}\nContext: {context}\nOptions: {options}\n"
SO_THE_ANSWER_IS = "So the answer is"

TASKS: dict[str, Task] = {
    "text_to_image": Task(("captions",), ("{caption} <break> {image}",), _captions, "composition", ((0,),)),
    "write": Task(("text_in_image",), ('draw "{text}" <break> {image}',), _written, "write/text", ((0,),)),
    "layout_to_image": Task(
        ("captions", "objects"),
        ("Generate high quality image of {caption} with segmentations {layout} <break> {image}",),
        _layout,
        "layout/iou",
        ((0,),),
    ),
    "condition_to_image": Task(
        ("captions", "conditions"),
        ("Make high quality image from {kind} features <break> {condition} <break> {caption} <break> {image}",),
        _condition,
        "condition/agreement",
        ((1, 2),),
    ),
    "edit": Task(
        ("instruction", "edited_from"),
        ("Edit first image following the instruction <break> {source} <break> {instruction} <break> {image}",),
        _edit,
        "edit/done",
        ((2,), (1, 2)),
    ),
    "caption": Task(
        ("captions",),
        ("{answer} <break> {image}", "Describe the given picture. {answer} <break> {image}"),
        _captions,
        "cider",
    ),
    "long_caption": Task(
        ("long_caption",),
        (
            "Describe the given picture in very detail. {answer} <break> {image}",
            "Describe the given picture in every detail. {answer} <break> {image}",
        ),
        _long_caption,
        "long_caption/cider",
    ),
    "vqa": Task(
        ("questions",),
        (
            "Question: {question} Answer: {answer}. <break> {image}",
            "Question: {question}\n{answer} <break> {image}",
            "Question: {question} The answer is {answer}. <break> {image}",
        ),
        _questions,
        "vqa_accuracy",
    ),
    "reasoning": Task(
        ("reasoning",),
        (_ASKED + "Let's think step-by-step: {explained} <break> {image}", _ASKED + "Answer: {answer}. <break> {image}"),
        _reasoning,
        "reasoning/accuracy",
    ),
}

TASK_COLUMNS = ("id", "width", "height", *dict.fromkeys(column for task in TASKS.values() for column in task.columns))
"""Columns of the manifest that tasks read."""


def is_filled(value: Any) -> bool:
    """True if a manifest cell holds a number, or a text or list that is not empty."""
    return value is not None and (len(value) > 0 if hasattr(value, "__len__") else value == value)


def available(row: Row) -> list[str]:
    """Names of the tasks whose columns are filled in a manifest row."""
    return [name for name, task in TASKS.items() if all(is_filled(row.get(column)) for column in task.columns)]


def counts_of_tasks(rows: Iterable[Row]) -> dict[str, int]:
    """Task -> the number of manifest rows that have what it needs, for tasks that any row has."""
    counts = Counter(name for row in rows for name in available(row))
    return {name: counts[name] for name in TASKS if name in counts}


# --- texts -------------------------------------------------------------------------------------------------------------------------------


def layout_text(objects: Sequence[tuple[str, Box]]) -> str:
    """Objects and their boxes as the templates write them, in pixels from 0 to 255; ``objects`` have boxes as fractions of the side.

    They are listed from top to bottom, then from left to right, as images are generated, whatever order they are given in: models learn
    such layouts earlier than in random order (docs/log.md).
    """
    parts = []
    for label, box in sorted(objects, key=lambda item: (item[1][1], item[1][0])):
        x0, y0, x1, y1 = (round(value * 255) for value in box)
        parts.append(f"{label} at ({x0}, {y0}) -> ({x1}, {y1})")
    return ", ".join(parts)


def box_in_square(box: Sequence[float], width: int, height: int) -> Box | None:
    """A box in pixels as fractions of the center crop that models see, clipped to it; None if the box's center is outside."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    x0, x1 = ((value - left) / side for value in (box[0], box[2]))
    y0, y1 = ((value - top) / side for value in (box[1], box[3]))
    if not (0 <= (x0 + x1) / 2 <= 1 and 0 <= (y0 + y1) / 2 <= 1):
        return None
    return max(x0, 0.0), max(y0, 0.0), min(x1, 1.0), min(y1, 1.0)


def visible_objects(row: Row) -> list[tuple[str, Box]]:
    """Labels and boxes, as :func:`box_in_square` gives them, of a manifest row's objects inside the center crop."""
    placed = [(item["label"], box_in_square(item["box"], row["width"], row["height"])) for item in row["objects"]]
    return [(label, box) for label, box in placed if box is not None]


def reasoning_fields(question: str, options: Sequence[str], context: str) -> Fields:
    """The fields of the reasoning templates, except the answer."""
    listed = " ".join(f"({chr(ord('A') + number)}) {option}" for number, option in enumerate(options))
    return {"question": question, "context": context, "options": listed}


def conclusion(text: str) -> str:
    """The answer at the end of an explanation, without its period; the whole text if it has no conclusion."""
    return text.rpartition(SO_THE_ANSWER_IS)[2].strip().rstrip(".")


def split_template(template: str, values: Mapping[str, str]) -> tuple[str, str, str]:
    """A text template filled in: the text before the answer, the answer with the space before it, and the text after it.

    The answer is empty if the template has none or ``values`` does not give it.
    """
    blank = BLANK.search(template)
    if blank is None:
        return template.format(**values), "", ""
    before, after = template[: blank.start()].format(**values), template[blank.end() :].format(**values)
    return before, blank[1] + values[blank[2]] if blank[2] in values else blank[1], after


def lay_out(
    template: str, asked: Sequence[Mapping[str, str]], images: Mapping[str, np.ndarray], vocabulary: Vocabulary, tokenizer: TextTokenizer
) -> tuple[list[SegmentTokens], list[tuple[int, int]]]:
    """The segments of a sequence, and the answers' positions (start, stop) in the first of them (none for tasks that generate an image).

    Args:
        asked: values of the template's fields; several are several questions about one image, each on a line of the first segment.
        images: codes of the images by field name (``image``, ``source``, ``condition``). The sequence ends before one that is not given.
    """
    segments: list[SegmentTokens] = []
    answers: list[tuple[int, int]] = []
    for number, part in enumerate(template.split(BREAK)):
        if part in IMAGE_FIELDS:
            if part[1:-1] not in images:
                break
            segments.append(("image", vocabulary.image(images[part[1:-1]])))
            continue
        pieces: list[Tokens] = []
        for line, values in enumerate(asked if number == 0 else asked[:1]):
            before, answer, after = (vocabulary.text(tokenizer.encode(text)) for text in split_template(part, values))
            pieces += [vocabulary.text(tokenizer.encode("\n"))] if line else []
            start = sum(map(len, pieces)) + len(before)
            pieces += [before, answer, after]
            if BLANK.search(part):
                answers.append((start, start + len(answer)))
        segments.append(("text", np.concatenate(pieces)))
    return segments, answers


# --- the tasks a model was tuned for -----------------------------------------------------------------------------------------------------

TRAINING = "training.json"
"""File next to a decoder that says what it was trained for."""


@dataclass(frozen=True)
class Training:
    """What a model was trained for.

    Attributes:
        tasks: those of its instruction tuning.
        masked_prompts: it was trained with conditioning dropout, which guidance needs.
        unprompted_regions: also with images of which a region is masked and whose text is left out, which guided inpainting needs.
    """

    tasks: frozenset[str]
    masked_prompts: bool
    unprompted_regions: bool = False

    def write(self, directory: Path) -> None:
        """Write ``training.json`` next to a decoder."""
        (directory / TRAINING).write_text(json.dumps({**asdict(self), "tasks": sorted(self.tasks)}) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Training | None:
        """Read what :meth:`write` wrote; None if the directory has none.

        Raises:
            DamagedFileError: if it is truncated.
        """
        if not (directory / TRAINING).is_file():
            return None
        found = read_file(directory / TRAINING, read_json, "cm3leon sft")
        return cls(**{**found, "tasks": frozenset(found["tasks"])})
