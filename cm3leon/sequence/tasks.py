"""Instruction-tuning tasks (paper, Table 5): what each needs, how its sequences look, which segments it hides, how it is asked and scored.

A sequence is a template's segments, divided by ``<break>``. Text comes before the image that it is about, so an answer is produced by
infilling: it is masked where it stands and moved behind the image, ``instruction <mask:0> <break> image <mask:0> answer <eoss>``.
A training sample may ask several questions about its image, each with a mask of its own; at inference there is one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cm3leon.sequence.grammar import Tokens, Vocabulary
from cm3leon.sequence.text_tokenizer import TextTokenizer

CONDITIONS = ("canny edge", "segmentation map", "hed", "openpose", "depth", "3D norm", "children's scribbles", "M-LSD lines")
"""Kinds of condition images from which models learn to generate (paper, Table 5); a record may have others, which are kept and not used."""
BREAK = " <break> "
IMAGE = "{image}"
"""The image that a document is; ``{source}`` is the one it was edited from, ``{condition}`` one that shows its structure."""
PICTURES = (IMAGE, "{source}", "{condition}")
BLANK = re.compile(r"( ?)\{(answer|explained)\}")
"""What is answered by infilling; the blank before it belongs to the answer."""

Segment = tuple[str, Tokens]
"""Modality, ``text`` or ``image``, and token ids."""

Row = Mapping[str, Any]
Values = dict[str, str]
"""What fills the fields of a template: texts, and for pictures other than the document's own the key of their codes."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def condition_key(name: str, kind: str) -> str:
    """The id under which the codes of a record's condition image are kept."""
    return f"{name}/{kind}"


# --- what fills a template, drawn from a row of the manifest: one or several turns, in random order ----------------------------------


def _captions(row: Row, rng: np.random.Generator) -> list[Values]:
    caption = str(rng.choice(row["captions"]))
    return [{"caption": caption, "answer": caption}]


def _written(row: Row, rng: np.random.Generator) -> list[Values]:
    return [{"text": str(row["text_in_image"])}]


def _long_caption(row: Row, rng: np.random.Generator) -> list[Values]:
    return [{"answer": str(row["long_caption"])}]


def _questions(row: Row, rng: np.random.Generator) -> list[Values]:
    chosen = [row["questions"][int(number)] for number in rng.permutation(len(row["questions"]))]
    return [{"question": item["question"], "answer": str(rng.choice(item["answers"]))} for item in chosen]


def _reasoning(row: Row, rng: np.random.Generator) -> list[Values]:
    item = row["reasoning"][int(rng.integers(len(row["reasoning"])))]
    explained = f"{item['explanation']} {SO_THE_ANSWER_IS} {item['answer']}."
    return [{**problem_values(item["question"], item["options"], item["context"]), "answer": item["answer"], "explained": explained}]


def _layout(row: Row, rng: np.random.Generator) -> list[Values]:
    seen = visible_objects(row)
    order = [seen[int(number)] for number in rng.permutation(len(seen))]
    return [{**_captions(row, rng)[0], "layout": layout_text(order)}]


def _condition(row: Row, rng: np.random.Generator) -> list[Values]:
    known = [item["kind"] for item in row["conditions"] if item["kind"] in CONDITIONS]
    kinds = [known[int(number)] for number in rng.permutation(len(known))]
    return [{**_captions(row, rng)[0], "kind": kind, "condition": condition_key(row["id"], kind)} for kind in kinds]


def _edit(row: Row, rng: np.random.Generator) -> list[Values]:
    return [{"instruction": str(row["instruction"]), "source": str(row["edited_from"])}]


@dataclass(frozen=True)
class Task:
    """A task.

    columns: those of the manifest that a document must have filled. templates: the first is the one used at inference. turns: draws what
    fills a template from a row; more than one turn only where a sample may ask several questions. hidden: groups of segments for which only
    masks stand in some samples, so that guidance has its streams and a result can be judged by how likely it makes what was asked.
    method: of the generator. score: the task's main score in the evaluation record.
    """

    columns: tuple[str, ...]
    templates: tuple[str, ...]
    turns: Callable[[Row, np.random.Generator], list[Values]]
    method: str
    score: str
    hidden: tuple[tuple[int, ...], ...] = ()

    @property
    def draws(self) -> bool:
        """Whether the image, not a text, is what the task produces."""
        return not BLANK.search(self.templates[0])

    @property
    def sees(self) -> bool:
        """Whether it is given an image to draw another."""
        return self.draws and any(picture in self.templates[0] for picture in PICTURES[1:])


_ASKED = "Question: {question}\nContext: {context}\nOptions: {options}\n"
SO_THE_ANSWER_IS = "So the answer is"

TASKS: dict[str, Task] = {
    "text_to_image": Task(("captions",), ("{caption} <break> {image}",), _captions, "text_to_image", "composition", ((0,),)),
    "write": Task(("text_in_image",), ('draw "{text}" <break> {image}',), _written, "write", "write/text", ((0,),)),
    "layout_to_image": Task(
        ("captions", "objects"),
        ("Generate high quality image of {caption} with segmentations {layout} <break> {image}",),
        _layout,
        "layout_to_image",
        "layout/iou",
        ((0,),),
    ),
    "condition_to_image": Task(
        ("captions", "conditions"),
        ("Make high quality image from {kind} features <break> {condition} <break> {caption} <break> {image}",),
        _condition,
        "condition_to_image",
        "condition/agreement",
        ((1, 2),),
    ),
    "edit": Task(
        ("instruction", "edited_from"),
        ("Edit first image following the instruction <break> {source} <break> {instruction} <break> {image}",),
        _edit,
        "edit",
        "edit/done",
        ((2,), (1, 2)),
    ),
    "caption": Task(
        ("captions",),
        ("{answer} <break> {image}", "Describe the given picture. {answer} <break> {image}"),
        _captions,
        "caption",
        "cider",
    ),
    "long_caption": Task(
        ("long_caption",),
        (
            "Describe the given picture in very detail. {answer} <break> {image}",
            "Describe the given picture in every detail. {answer} <break> {image}",
        ),
        _long_caption,
        "caption",
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
        "answer",
        "vqa_accuracy",
    ),
    "reasoning": Task(
        ("reasoning",),
        (_ASKED + "Let's think step-by-step: {explained} <break> {image}", _ASKED + "Answer: {answer}. <break> {image}"),
        _reasoning,
        "reason",
        "reasoning/accuracy",
    ),
}

COLUMNS = ("id", "width", "height", *dict.fromkeys(column for task in TASKS.values() for column in task.columns))
"""Of the manifest, those that tasks read."""


def filled(value: Any) -> bool:
    """Whether a manifest's cell holds something: a number, a text or a list that is not empty."""
    return value is not None and (len(value) > 0 if hasattr(value, "__len__") else value == value)


def available(row: Row) -> list[str]:
    """Names of the tasks whose columns a manifest row has filled."""
    return [name for name, task in TASKS.items() if all(filled(row.get(column)) for column in task.columns)]


# --- texts -------------------------------------------------------------------------------------------------------------------------------


def layout_text(objects: Sequence[tuple[str, Box]]) -> str:
    """Objects and their boxes, in shares of the image's side, told as pixels from 0 to 255."""
    told = []
    for label, box in objects:
        x0, y0, x1, y1 = (round(value * 255) for value in box)
        told.append(f"{label} at ({x0}, {y0}) -> ({x1}, {y1})")
    return ", ".join(told)


def box_in_square(box: Sequence[float], width: int, height: int) -> Box | None:
    """A box in pixels of an image as shares of the centre square that models see; None where its centre is outside."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    x0, x1 = ((value - left) / side for value in (box[0], box[2]))
    y0, y1 = ((value - top) / side for value in (box[1], box[3]))
    if not (0 <= (x0 + x1) / 2 <= 1 and 0 <= (y0 + y1) / 2 <= 1):
        return None
    return max(x0, 0.0), max(y0, 0.0), min(x1, 1.0), min(y1, 1.0)


def visible_objects(row: Row) -> list[tuple[str, Box]]:
    """Labels and boxes, as :func:`box_in_square`, of a manifest row's objects that models see."""
    placed = [(item["label"], box_in_square(item["box"], row["width"], row["height"])) for item in row["objects"]]
    return [(label, box) for label, box in placed if box is not None]


def problem_values(question: str, options: Sequence[str], context: str) -> Values:
    """What fills the templates of reasoning, but for the answer."""
    told = " ".join(f"({chr(ord('A') + number)}) {option}" for number, option in enumerate(options))
    return {"question": question, "context": context, "options": told}


def conclusion(text: str) -> str:
    """The answer at the end of an explanation, or the whole text where it comes to none, without the full stop."""
    return text.rpartition(SO_THE_ANSWER_IS)[2].strip().rstrip(".")


def split_template(template: str, values: Mapping[str, str]) -> tuple[str, str, str]:
    """Of a text's template: what stands before the answer, the answer with the blank before it, what stands after; the answer is empty
    where the template has none or it is not given."""
    blank = BLANK.search(template)
    if blank is None:
        return template.format(**values), "", ""
    before, after = template[: blank.start()].format(**values), template[blank.end() :].format(**values)
    return before, blank[1] + values[blank[2]] if blank[2] in values else blank[1], after


def lay_out(
    template: str, asked: Sequence[Mapping[str, str]], images: Mapping[str, np.ndarray], vocabulary: Vocabulary, tokenizer: TextTokenizer
) -> tuple[list[Segment], list[tuple[int, int]]]:
    """Segments of a sequence, and where the answers stand in its first (none where an image is the answer).

    Several turns, all about one image, stand on a line each of the first segment.

    Args:
        images: codes of the pictures, by their names in the template, ``image`` and others. A sequence ends before a picture not given.
    """
    segments: list[Segment] = []
    answers: list[tuple[int, int]] = []
    for number, part in enumerate(template.split(BREAK)):
        if part in PICTURES:
            if part[1:-1] not in images:
                break
            segments.append(("image", vocabulary.image(images[part[1:-1]])))
            continue
        pieces: list[Tokens] = []
        for turn, values in enumerate(asked if number == 0 else asked[:1]):
            before, answer, after = (vocabulary.text(tokenizer.encode(text)) for text in split_template(part, values))
            pieces += [vocabulary.text(tokenizer.encode("\n"))] if turn else []
            start = sum(map(len, pieces)) + len(before)
            pieces += [before, answer, after]
            if BLANK.search(part):
                answers.append((start, start + len(answer)))
        segments.append(("text", np.concatenate(pieces)))
    return segments, answers


# --- what a model was tuned for ----------------------------------------------------------------------------------------------------------

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
