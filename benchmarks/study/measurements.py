"""Measurements of a decoder that only single claims need; each result can be written as JSON."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.study.runs import Study
from cm3leon.config import paths
from cm3leon.data.manifest import ImageStore, read_manifest
from cm3leon.evaluation import captions as caption_metrics
from cm3leon.evaluation import measure
from cm3leon.evaluation.context import Evaluation, sample_rows
from cm3leon.evaluation.image_tasks import infill
from cm3leon.evaluation.record import Record
from cm3leon.evaluation.run import headline, load_generator
from cm3leon.evaluation.tasks import MEASURES
from cm3leon.evaluation.text_tasks import answer_questions, sample_questions
from cm3leon.scenes import composition


def drawn_candidates(study: Study, model: Path, count: int, settings: dict[str, Any]) -> dict[str, list[list[float]]]:
    """``count`` images of each prompt, in the order in which they were drawn.

    Returns:
        ``right``: 1 if every attribute of the image is right, else 0; ``clip``: its CLIP score; (prompts, count) each.
    """
    generated = study.generator(model).text_to_image(study.captions, count, **settings)
    found: dict[str, list[list[float]]] = {"right": [], "clip": []}
    for caption, images in zip(study.captions, generated, strict=True):
        drawn = sorted(images, key=lambda image: image.seed)
        outcomes = composition.check_images([caption] * count, [image.image for image in drawn])
        found["right"].append(list(composition.all_right(outcomes).values()))
        found["clip"].append([image.score for image in drawn if image.score is not None])
    return found


def infilling_cider(study: Study, model: Path) -> float:
    """CIDEr of captions of val images by a decoder that was not tuned: the caption is infilled after the image."""
    generator, store = study.generator(model), ImageStore(paths.RAW)
    rows = sample_rows(read_manifest(paths.VALIDATED, "val"), study.prompts, 0)
    texts = generator.caption([store.open(ref) for ref in rows["image"]])
    captions = dict(zip(rows["id"], (caption.text for caption in texts), strict=True))
    references = dict(zip(rows["id"], map(list, rows["captions"]), strict=True))
    return caption_metrics.score(captions, references)["cider"]


def task_scores(study: Study, model: Path) -> dict[str, dict[str, Any]]:
    """Main scores of every task on the val split: ``mean`` and ``interval``; of a tuned decoder, of the tasks it was tuned for."""
    config = study.config.model_copy(update={"evaluate": study.config.evaluate.model_copy(update={"tasks": study.prompts})})
    bootstrap = (config.evaluate.bootstrap, 0)
    generator, record = load_generator(config, model), Record()
    store, val = ImageStore(paths.RAW), read_manifest(paths.VALIDATED, "val")

    # 1. The tasks that measure themselves.
    assert generator.encoder is not None
    evaluation = Evaluation(config, generator, generator.encoder, store, val, record)
    for measure_task in (*(own for name, own in MEASURES.items() if name in generator.trained_tasks), infill):
        measure_task(evaluation)

    # 2. Text to image.
    outcomes = composition.check_images(study.captions, evaluation.generate_images(generator.text_to_image, study.captions))
    for name, correct in composition.by_attribute(outcomes).items():
        record.add(name, {str(position): value for position, value in correct.items()}, *bootstrap, share=True)

    # 3. Questions and captions.
    keys, refs, questions, truths = zip(*sample_questions(val, 2 * study.prompts, 0), strict=True)
    answers = answer_questions(evaluation, refs, questions)
    measure.measure_answers(record, questions, answers, None, truths, keys, Counter(), *bootstrap)
    rows = sample_rows(val, study.prompts, 0)
    captions = evaluation.generate_texts(generator.caption, evaluation.stored(rows["image"].tolist()))
    measure.measure_captions(record, rows["id"].tolist(), captions, [list(texts) for texts in rows["captions"]], *bootstrap)

    return {name: {"mean": score, "interval": record.intervals[name]} for name, score in headline(record).items() if name in record.scores}
