"""Measurements of the tasks that generate text; each function works like those of ``image_tasks.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cm3leon.data.manifest import records_of
from cm3leon.evaluation import captions as caption_metrics
from cm3leon.evaluation import measure, vqa
from cm3leon.evaluation.context import Evaluation, Sheet
from cm3leon.evaluation.measure import shifted_positions
from cm3leon.sequence.tasks import Fields, conclusion, reasoning_fields


class Asked(NamedTuple):
    """A question about an image.

    Attributes:
        key: id of the record, ``#`` and the question's number in it.
        image: reference of the stored image.
        answers: the reference answers.
    """

    key: str
    image: str
    question: str
    answers: list[str]


def sample_questions(manifest: pd.DataFrame, count: int, seed: int) -> list[Asked]:
    """Up to ``count`` questions, sampled by the seed from those of all records."""
    found = [
        Asked(f"{record['id']}#{number}", record["image"], item["question"], list(item["answers"]))
        for record in records_of(manifest[["id", "image", "questions"]])
        for number, item in enumerate(record["questions"] if record["questions"] is not None else ())
    ]
    order = np.random.default_rng(seed).permutation(len(found))[:count]
    return [found[int(i)] for i in sorted(order)]


def training_answers(manifest: pd.DataFrame) -> Counter[tuple[str, str]]:
    """How often each (question, first answer) occurs in a manifest, for the majority baseline."""
    return Counter(
        (item["question"], item["answers"][0])
        for questions in manifest["questions"]
        for item in (questions if questions is not None else ())
    )


def answer_questions(e: Evaluation, refs: Sequence[str], questions: Sequence[str]) -> list[str]:
    """Answer each question about its stored image; questions too long for the context are cut at their end."""
    return e.generate_texts(e.generator.vqa, e.stored(refs), [e.generator.shorten_question(question) for question in questions])


def caption(e: Evaluation, captioned: pd.DataFrame) -> Sheet:
    """Short captions: CIDEr, BLEU, ROUGE-L.

    Calibration: that of :func:`~cm3leon.evaluation.measure.measure_captions`.

    Args:
        captioned: the records whose images are captioned.
    """
    images = e.images(captioned["image"].tolist())
    captions = e.generate_texts(e.generator.caption, images)
    references = [list(texts) for texts in captioned["captions"]]
    section = e.config.evaluate
    measure.measure_captions(e.record, captioned["id"].tolist(), captions, references, section.bootstrap, section.seed)
    return list(zip(images, captions, strict=True))


def answer_vqa(e: Evaluation, asked: Sequence[Asked], frequent: Counter[tuple[str, str]]) -> Sheet:
    """Visual question answering: VQA accuracy. On the sheet, a wrong answer is followed by the first reference.

    Calibration: that of :func:`~cm3leon.evaluation.measure.measure_answers`.

    Args:
        frequent: counts of training answers (:func:`training_answers`).
    """
    keys, refs, questions, truths = zip(*asked, strict=True)
    answers = answer_questions(e, refs, questions)
    # Baseline: the same questions about other images.
    others = measure.images_of_others(refs)
    answers_of_others = answer_questions(e, others, questions) if others else None
    section = e.config.evaluate
    measure.measure_answers(
        e.record, questions, answers, answers_of_others, truths, keys, frequent, section.bootstrap, section.seed
    )  # fmt: skip
    # The sheet; only its images are opened again.
    shown = list(zip(asked, answers, strict=True))[: section.sheet]
    images = e.images([item.image for item, _ in shown])
    wrong = ["" if vqa.answer_score(said, item.answers) else f" (not {item.answers[0]})" for item, said in shown]
    return [(image, f"{item.question} {said}{note}") for image, (item, said), note in zip(images, shown, wrong, strict=True)]


def long_caption(e: Evaluation) -> Sheet:
    """Long captions: CIDEr and ROUGE-L. Calibration: the same captions against the references of other records (baseline)."""
    rows = e.rows("long_caption", ("long_caption",))
    if not rows:
        return []
    images = e.images([row.image for row in rows])
    e.asked("long_caption", [[row.id, row.long_caption] for row in rows])
    captions = e.generate_texts(e.generator.long_caption, images)
    ids = [row.id for row in rows]
    references = {row.id: [row.long_caption] for row in rows}
    for name, values in caption_metrics.per_image(dict(zip(ids, captions, strict=True)), references).items():
        e.add(f"long_caption/{name}", ids, values)
    if len(rows) > 1:
        shifted = {id_: captions[number] for id_, number in zip(ids, shifted_positions(len(ids)), strict=True)}
        e.calibrate("long_caption/cider_other_images", caption_metrics.per_image(shifted, references)["cider"])
    return list(zip(images, captions, strict=True))


def reasoning(e: Evaluation) -> Sheet:
    """Multiple-choice reasoning: accuracy with an explanation before the answer, and without.

    Calibration (baselines): the answers to the same questions about the images of other records, and a random choice.
    """

    def values(row: Any) -> Fields:
        problem = row.reasoning[0]
        return reasoning_fields(problem["question"], problem["options"], problem["context"])

    rows = e.rows("reasoning", ("reasoning",), values=values)
    if not rows:
        return []
    images = e.images([row.image for row in rows])
    problems = [row.reasoning[0] for row in rows]
    truths = [problem["answer"] for problem in problems]
    e.asked("reasoning", [[row.id, problem] for row, problem in zip(rows, problems, strict=True)])
    asked = tuple([problem[name] for problem in problems] for name in ("question", "options", "context"))

    def right(answers: Sequence[str]) -> list[float]:
        return [float(conclusion(answer) == conclusion(truth)) for answer, truth in zip(answers, truths, strict=True)]

    ids = [row.id for row in rows]
    explained = e.generate_texts(e.generator.reasoning, images, *asked)
    e.add("reasoning/accuracy", ids, right(explained), share=True)
    unexplained = e.generate_texts(e.generator.reasoning, images, *asked, explain=False)
    e.add("reasoning/accuracy_unexplained", ids, right(unexplained), share=True)
    e.calibrate("reasoning/accuracy_guess", [1 / len(problem["options"]) for problem in problems])
    if len(rows) > 1:
        other_images = [images[number] for number in shifted_positions(len(images))]
        e.calibrate("reasoning/accuracy_other_images", right(e.generate_texts(e.generator.reasoning, other_images, *asked)))
    return [(image, f"{question} {text}") for image, question, text in zip(images, asked[0], explained, strict=True)]
