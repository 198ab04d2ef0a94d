"""Stage ``evaluate``: what the finished model can do, measured on the test split under a written contract."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from pydantic import ValidationError

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.data.images import fit_square
from cm3leon.data.manifest import ImageStore, first_caption, read_manifest
from cm3leon.data.pixels import ImageSet
from cm3leon.evaluation import leakage, measure, vqa
from cm3leon.evaluation.alignment import clip_score
from cm3leon.evaluation.inception import Inception, fetch_weights
from cm3leon.evaluation.record import FILE as RECORD
from cm3leon.evaluation.record import Record, digest
from cm3leon.evaluation.tasks import MEASURES, Evaluation, Sheet, best, infill
from cm3leon.evaluation.upscaling import measure_upscaling
from cm3leon.generation.generator import Generator
from cm3leon.models.super_resolution import target_side
from cm3leon.models.vqgan import reconstruct
from cm3leon.scenes import composition
from cm3leon.tracking import runs
from cm3leon.tracking.lineage import content_hash
from cm3leon.utils.device import default_device
from cm3leon.utils.errors import UserError
from cm3leon.utils.images import save_captioned

CONFUSIONS = "confusions.csv"
SECTIONS = ("evaluate", "decoding", "retrieve")
"""Parameters that an evaluation depends on, which its record repeats."""
MODELS = (
    paths.FINETUNED, paths.IMAGE_TOKENIZER, paths.TEXT_TOKENIZER, paths.ENCODER, paths.INDEX, paths.TOKENS, paths.SUPER_RESOLUTION
)  # fmt: skip
TOLERANCE = 1e-5
"""Figures of a record, which have six digits behind the point, agree when they differ by less."""


def choose(manifest: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """``count`` rows (or all), drawn by the seed."""
    order = np.random.default_rng(seed).permutation(len(manifest))[:count]
    return manifest.iloc[np.sort(order)]


def ask_questions(manifest: pd.DataFrame, count: int, seed: int) -> list[tuple[str, str, list[str]]]:
    """(image, question, answers), one row each, drawn by the seed from all questions."""
    found = [
        (row.image, item["question"], list(item["answers"]))
        for row in manifest.itertuples()
        for item in (row.questions if row.questions is not None else ())
    ]
    order = np.random.default_rng(seed).permutation(len(found))[:count]
    return [found[int(i)] for i in sorted(order)]


def training_answers(manifest: pd.DataFrame) -> Counter[tuple[str, str]]:
    """How often each answer occurs for each kind of question."""
    return Counter(
        (measure.question_kind(item["question"]), item["answers"][0])
        for questions in manifest["questions"]
        for item in (questions if questions is not None else ())
    )


def answer_all(generator: Generator, store: ImageStore, refs: Sequence[str], questions: Sequence[str]) -> list[str]:
    """An answer to each question about its image; questions too long for the context lose their end."""
    images = fitted(generator, store, refs)
    return [answer.text for answer in generator.vqa(images, [generator.shorten_question(question) for question in questions])]


def fitted(generator: Generator, store: ImageStore, refs: Sequence[str]) -> list[Image.Image]:
    """The images as the tokenizer takes them."""
    return [fit_square(store.open(ref), generator.image_tokenizer.spec.image_size) for ref in refs]


def measure_upscaler(
    record: Record, generator: Generator, store: ImageStore, refs: Sequence[str], side: int, resamples: int, seed: int
) -> None:
    """PSNR (RGB and Y) and SSIM (Y) of reductions of the images, upscaled again, against the images. Calibration: bicubic interpolation."""
    assert generator.super_resolution is not None
    figures = measure_upscaling(generator.super_resolution, ImageSet(store, refs, side))
    for name in ("psnr_rgb", "psnr_y", "ssim_y"):
        if name in figures:
            record.add(f"super_resolution_{name}", figures[name], resamples, seed)
            record.calibration[f"super_resolution_{name}_bicubic"] = float(np.mean(figures[f"{name}_bicubic"]))


def contract(
    config: Config,
    rows: pd.DataFrame,
    prompts: list[str],
    captioned: pd.DataFrame,
    asked: list[Any],
    generator: Generator,
    side: int,
    inception: str | None,
) -> dict[str, Any]:
    """What was asked and how: equal contracts make scores comparable.

    Args:
        side: of the images the upscaler is measured on, pixels.
        inception: fingerprint of the FID network's weights.
    """
    references = [list(texts) for texts in captioned["captions"]]
    return {
        "images": digest(rows["id"].tolist()),
        "prompts": digest(prompts),
        "captioned": digest(captioned["id"].tolist()),
        "references": digest(references),
        "questions": digest(asked),
        "counts": {"prompts": len(prompts), "captioned": len(captioned), "questions": len(asked)},
        "seed": config.evaluate.seed,
        "decoding": config.decoding.model_dump(),
        "retrieval": config.retrieve.model_dump() if config.decoding.retrieved_documents else None,
        "image_path": f"fit_square to {generator.image_tokenizer.spec.image_size} px, Lanczos, no file format between",
        "super_resolution": f"bicubic reductions of images of {side} px; Y without a border as wide as the scale",
        "features": f"open_clip image tower {generator.encoder.fingerprint}" if generator.encoder else None,
        "inception": inception,
        "bootstrap": config.evaluate.bootstrap,
    }


def load(config: Config, model: Path = paths.FINETUNED) -> Generator:
    """The generator on the stages' outputs."""
    return Generator.from_parts(
        model=model,
        image_tokenizer=paths.IMAGE_TOKENIZER,
        text_tokenizer=paths.TEXT_TOKENIZER,
        encoder=paths.ENCODER,
        memory_bank=paths.INDEX,
        tokens=paths.TOKENS,
        super_resolution=paths.SUPER_RESOLUTION,
        decoding=config.decoding,
        retrieval=config.retrieve,
    )


def evaluate(config: Config, output: Path) -> Record:
    """Measure the models in ``models/``; writes the record, sheets and the table of confusions to ``output``.

    What the model was not tuned for is not measured.

    Raises:
        LeakageError: if held-out documents stand in training or in the memory bank.
        UserError: if Inception's weights are asked for and cannot be had.
    """
    section = config.evaluate
    resampling = (section.bootstrap, section.seed)
    generator = load(config)
    assert generator.encoder is not None and generator.super_resolution is not None and generator.memory is not None
    inception = inception_of(section.inception)
    store, test, train = ImageStore(paths.RAW), read_manifest(paths.VALIDATED, "test"), read_manifest(paths.VALIDATED, "train")
    known = generator.memory.bank.documents["id"].tolist()
    leakage.check(test["id"].tolist(), train["id"].tolist(), known, paths.VALIDATED, config.validate_.near_duplicate_distance)
    rows, captioned = choose(test, section.prompts, section.seed), choose(test, section.captions, section.seed)
    prompts = [generator.shorten(first_caption(captions)) for captions in rows["captions"]]
    asked = ask_questions(test, section.questions, section.seed)
    side = target_side(rows, generator.image_tokenizer.spec.image_size, generator.super_resolution.scale)
    record = Record(
        contract=contract(config, rows, prompts, captioned, asked, generator, side, inception.fingerprint if inception else None),
        settings={name: getattr(config, name).model_dump(mode="json") for name in SECTIONS},
        models={str(path): content_hash(path) for path in MODELS},
    )
    measure_upscaler(record, generator, store, rows["image"].tolist(), side, *resampling)
    evaluation = Evaluation(config, generator, store, test, record)
    sheets: dict[str, Sheet] = {}
    if "text_to_image" in generator.trained_tasks:
        sheets["samples"] = draw(evaluation, rows, prompts, inception)
    if "caption" in generator.trained_tasks:
        sheets["captions"] = describe(evaluation, captioned)
    if asked and "vqa" in generator.trained_tasks:
        sheets["vqa"] = answer(evaluation, asked, training_answers(train))
    sheets |= {name: measured(evaluation) for name, measured in MEASURES.items() if name in generator.trained_tasks}
    sheets["infill"] = infill(evaluation)
    for old in [*output.glob("*.png"), output / CONFUSIONS]:  # of an evaluation of another model
        old.unlink(missing_ok=True)
    record.write(output)
    for name, shown in sheets.items():
        if shown:
            images, texts = zip(*shown[: section.sheet], strict=True)
            save_captioned(images, texts, output / f"{name}.png")
    if "samples" in sheets:
        (output / CONFUSIONS).write_text(composition.confusions(prompts, [image for image, _ in sheets["samples"]]))
    return record


def inception_of(weights: str | None) -> Inception | None:
    """The FID network as ``evaluate.inception`` names it: a path, or ``download``."""
    if weights is None:
        return None
    try:
        return Inception.load(fetch_weights() if weights == "download" else Path(weights)).to(default_device())
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"evaluate.inception {weights}: {error}") from None


def draw(e: Evaluation, rows: pd.DataFrame, prompts: list[str], inception: Inception | None) -> Sheet:
    """Images of held-out captions. Calibration, beside those of the measures: the same of one candidate each, which nothing ranked."""
    generator, section = e.generator, e.config.evaluate
    resampling = (section.bootstrap, section.seed)
    assert generator.encoder is not None
    originals = e.pictures(rows["image"].tolist())
    _, pixels = reconstruct(generator.image_tokenizer, torch.from_numpy(np.stack([np.asarray(image) for image in originals])))
    reconstructions = [Image.fromarray(array) for array in pixels.numpy()]
    drawn = best(generator.text_to_image(prompts, seed=section.seed))
    measure.measure_composition(e.record, prompts, drawn, reconstructions, originals, *resampling)
    measure.measure_images(e.record, generator.encoder, prompts, drawn, reconstructions, originals, *resampling)
    unranked = best(generator.text_to_image(prompts, seed=section.seed, candidates=1))
    e.calibrate("clip_score_one_candidate", clip_score(generator.encoder, unranked, prompts))
    if "composition" in e.record.scores:
        e.record.calibration["composition_one_candidate"] = composition.score(prompts, unranked)["composition"]
    if inception:
        measure.measure_fidelity(e.record, "inception", inception, drawn, reconstructions, originals, *resampling)
    return list(zip(drawn, prompts, strict=True))


def describe(e: Evaluation, captioned: pd.DataFrame) -> Sheet:
    """Captions of held-out images."""
    pictures = e.pictures(captioned["image"].tolist())
    captions = [caption.text for caption in e.generator.caption(pictures)]
    references = [list(texts) for texts in captioned["captions"]]
    section = e.config.evaluate
    measure.measure_captions(e.record, captioned["id"].tolist(), captions, references, section.bootstrap, section.seed)
    return list(zip(pictures, captions, strict=True))


def answer(e: Evaluation, asked: Sequence[tuple[str, str, list[str]]], frequent: Counter[tuple[str, str]]) -> Sheet:
    """Answers to questions about held-out images; on the sheet the first reference stands behind an answer that is none of them."""
    images, questions, truths = zip(*asked, strict=True)
    answers, others = answer_all(e.generator, e.store, images, questions), measure.pictures_of_others(asked)
    answers_of_others = answer_all(e.generator, e.store, others, questions) if others else None
    section = e.config.evaluate
    measure.measure_answers(
        e.record, questions, answers, answers_of_others, truths, images, frequent, section.bootstrap, section.seed
    )  # fmt: skip
    shown = list(zip(asked, answers, strict=True))[: section.sheet]
    pictures = e.pictures([image for (image, _, _), _ in shown])
    wrong = ["" if vqa.answer_score(said, truth) else f" (not {truth[0]})" for (_, _, truth), said in shown]
    return [(p, f"{question} {said}{note}") for p, ((_, question, _), said), note in zip(pictures, shown, wrong, strict=True)]


def run(config: Config) -> dict[str, float]:
    """Writes ``models/evaluation/record.json`` and sheets; returns the main scores and their calibrations."""
    with runs.stage_run("evaluate", config) as run:
        record = evaluate(config, paths.EVALUATION)
        run.log_metrics({f"eval/{name}": value for name, value in record.scores.items()})
        run.log_metrics({f"calibration/{name}": value for name, value in record.calibration.items()})
        for sheet in sorted(paths.EVALUATION.glob("*.png")):
            run.log_artifact(sheet, "samples")
        for table in (CONFUSIONS, RECORD):
            if (paths.EVALUATION / table).is_file():
                run.log_artifact(paths.EVALUATION / table)
    return headline(record)


def headline(record: Record) -> dict[str, float]:
    """The scores and calibrations worth a line in the final table: those of tasks, not of their kinds."""
    apart = ("bleu_1", "bleu_2", "bleu_3", "composition/", "vqa_accuracy/", "condition/agreement/")
    main = {name: value for name, value in record.scores.items() if not name.startswith(apart)}
    return {**main, **record.calibration}


Difference = tuple[str, float | None, float | None]
"""Name of a figure, its recorded and its new value; None where one side has none."""


def reproduce(config: Config, path: Path) -> tuple[int, list[Difference]]:
    """Evaluate again as a record says, with its own settings; how many figures there are, and those that do not agree.

    Raises:
        UserError: if it is no record of an evaluation with settings, or was made with other models than those in ``models/``.
    """
    try:
        old = Record.read_file(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no evaluation record ({error}); evaluate writes models/evaluation/record.json") from None
    if set(old.settings) != set(SECTIONS):
        raise UserError(f"{path} does not say with which settings it was made; evaluate anew to have a record that does")
    if changed := [str(model) for model in MODELS if old.models.get(str(model)) != content_hash(model)]:
        raise UserError(
            f"{path} was made with other models: {', '.join(changed)} changed since; check out those of the record (dvc checkout)"
        )
    try:
        sections = {name: type(getattr(config, name)).model_validate(values) for name, values in old.settings.items()}
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, found["loc"])) for found in error.errors())
        raise UserError(f"{path} was made by other code, with settings that this one does not take: {wrong}; evaluate anew") from None
    with tempfile.TemporaryDirectory() as folder:
        new = evaluate(config.model_copy(update=sections), Path(folder))
        new = Record.read(Path(folder))
    if changed := sorted(name for name in old.contract | new.contract if old.contract.get(name) != new.contract.get(name)):
        raise UserError(f"{path} was made on other data or code: its contract differs in {', '.join(changed)}")
    pairs = [*_paired("", old.scores, new.scores), *_paired("calibration ", old.calibration, new.calibration)]
    agree = [one is not None and other is not None and math.isclose(one, other, abs_tol=TOLERANCE) for _, one, other in pairs]
    return len(pairs), [pair for pair, same in zip(pairs, agree, strict=True) if not same]


def _paired(prefix: str, old: dict[str, float], new: dict[str, float]) -> list[Difference]:
    return [(prefix + name, old.get(name), new.get(name)) for name in sorted(old | new)]
