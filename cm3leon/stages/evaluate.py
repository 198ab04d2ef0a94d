"""Stage ``evaluate``: what the finished model can do, measured on the test split under a written contract."""

from __future__ import annotations

import hashlib
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

from cm3leon import paths, super_resolution, tracking
from cm3leon.config import Config, UserError
from cm3leon.data.images import fit_square
from cm3leon.data.manifest import ImageStore, read_manifest
from cm3leon.data.pixels import ImageSet
from cm3leon.evaluation import composition, leakage, measure
from cm3leon.evaluation.inception import Inception
from cm3leon.evaluation.record import Record, digest
from cm3leon.generation.generator import Generator
from cm3leon.stages.common import save_captioned
from cm3leon.stages.evaluation_tasks import MEASURES, Evaluation, first_caption, infill
from cm3leon.stages.super_resolution import target_side
from cm3leon.tokenizers.image import reconstruct

SAMPLES = "samples.png"
CAPTIONED = "captions.png"
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
    return [answer.text for answer in generator.answer(images, [generator.shorten_question(question) for question in questions])]


def fitted(generator: Generator, store: ImageStore, refs: Sequence[str]) -> list[Image.Image]:
    """The images as the tokenizer takes them."""
    return [fit_square(store.open(ref), generator.image_tokenizer.spec.image_size) for ref in refs]


def measure_upscaler(record: Record, generator: Generator, store: ImageStore, refs: Sequence[str], side: int) -> None:
    """PSNR (RGB and Y) and SSIM (Y) of reductions of the images, upscaled again, against the images. Calibration: bicubic interpolation."""
    assert generator.super_resolution is not None
    figures = super_resolution.evaluate(generator.super_resolution, ImageSet(store, refs, side))
    for name in ("psnr_rgb", "psnr_y", "ssim_y"):
        if name in figures:
            record.scores[f"super_resolution_{name}"] = figures[name]
            record.calibration[f"super_resolution_{name}_bicubic"] = figures[f"{name}_bicubic"]


def contract(
    config: Config, rows: pd.DataFrame, prompts: list[str], captioned: pd.DataFrame, asked: list[Any], generator: Generator, side: int
) -> dict[str, Any]:
    """What was asked and how: equal contracts make scores comparable. ``side``: of the images the upscaler is measured on, pixels."""
    references = [list(texts) for texts in captioned["captions"]]
    inception = config.evaluate.inception
    return {
        "images": digest(rows["id"].tolist()),
        "prompts": digest(prompts),
        "captioned": digest(captioned["id"].tolist()),
        "references": digest(references),
        "questions": digest(asked),
        "counts": {"prompts": len(prompts), "captioned": len(captioned), "questions": len(asked)},
        "seed": config.evaluate.seed,
        "decoding": config.decoding.model_dump(),
        "retrieval": config.retrieve.model_dump() if config.decoding.documents else None,
        "image_path": f"fit_square to {generator.image_tokenizer.spec.image_size} px, Lanczos, no file format between",
        "super_resolution": f"bicubic reductions of images of {side} px; Y without a border as wide as the scale",
        "features": f"open_clip image tower {generator.encoder.fingerprint}" if generator.encoder else None,
        "inception": hashlib.sha256(Path(inception).read_bytes()).hexdigest()[:16] if inception else None,
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

    Raises:
        LeakageError: if held-out documents stand in training or in the memory bank.
    """
    section = config.evaluate
    resampling = (section.bootstrap, section.seed)
    generator = load(config)
    assert generator.encoder is not None and generator.super_resolution is not None and generator.memory is not None
    store, test, train = ImageStore(paths.RAW), read_manifest(paths.VALIDATED, "test"), read_manifest(paths.VALIDATED, "train")
    known = generator.memory.bank.documents["id"].tolist()
    leakage.check(test, train, known, store, config.validate_.near_duplicate_distance)
    rows, captioned = choose(test, section.prompts, section.seed), choose(test, section.captions, section.seed)
    prompts = [generator.shorten(first_caption(captions)) for captions in rows["captions"]]
    originals = fitted(generator, store, rows["image"].tolist())
    _, pixels = reconstruct(generator.image_tokenizer, torch.from_numpy(np.stack([np.asarray(image) for image in originals])))
    reconstructions = [Image.fromarray(array) for array in pixels.numpy()]
    asked = ask_questions(test, section.questions, section.seed)
    side = target_side(rows, generator.image_tokenizer.spec.image_size, generator.super_resolution.scale)

    record = Record(
        contract=contract(config, rows, prompts, captioned, asked, generator, side),
        settings={name: getattr(config, name).model_dump(mode="json") for name in SECTIONS},
        models={str(path): content_hash(path) for path in MODELS},
    )
    drawn = [images[0].image for images in generator.text_to_image(prompts, seed=section.seed)]
    measure.measure_composition(record, prompts, drawn, reconstructions, originals, *resampling)
    measure.measure_images(record, generator.encoder, prompts, drawn, reconstructions, originals, *resampling)
    if section.inception:
        measure.measure_fidelity(
            record, "inception", Inception.load(Path(section.inception)), drawn, reconstructions, originals, section.seed
        )
    measure_upscaler(record, generator, store, rows["image"].tolist(), side)
    pictures = fitted(generator, store, captioned["image"].tolist())
    captions = [caption.text for caption in generator.caption(pictures)]
    measure.measure_captions(record, captioned["id"].tolist(), captions, [list(texts) for texts in captioned["captions"]], *resampling)
    if asked:
        questions, truths = [question for _, question, _ in asked], [truth for _, _, truth in asked]
        answers, others = answer_all(generator, store, [ref for ref, _, _ in asked], questions), measure.pictures_of_others(asked)
        answers_of_others = answer_all(generator, store, others, questions) if others else None
        measure.measure_answers(record, questions, answers, answers_of_others, truths, training_answers(train), *resampling)
    evaluation = Evaluation(config, generator, store, test, record)
    sheets = {name: measured(evaluation) for name, measured in MEASURES.items() if name in generator.trained_tasks}
    sheets["infill"] = infill(evaluation)
    record.write(output)
    save_captioned(drawn[: section.sheet], prompts[: section.sheet], output / SAMPLES)
    save_captioned(pictures[: section.sheet], captions[: section.sheet], output / CAPTIONED)
    for name, shown in sheets.items():
        if shown:
            images, texts = zip(*shown[: section.sheet], strict=True)
            save_captioned(images, texts, output / f"{name}.png")
    (output / CONFUSIONS).write_text(composition.confusions(prompts, drawn))
    return record


def content_hash(path: Path) -> str:
    """SHA-256 over the names and contents of a directory's files, first 16 hex digits; pictures and logs apart."""
    found = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file() and file.suffix not in (".png", ".csv")):
        with file.open("rb") as stream:
            found.update(f"{file.relative_to(path)}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()[:16]


def run(config: Config) -> dict[str, float]:
    """Writes ``models/evaluation/record.json`` and sheets; returns the main scores and their calibrations."""
    with tracking.stage_run("evaluate", config) as run:
        record = evaluate(config, paths.EVALUATION)
        run.log_metrics({f"eval/{name}": value for name, value in record.scores.items()})
        run.log_metrics({f"calibration/{name}": value for name, value in record.calibration.items()})
        for sheet in sorted(paths.EVALUATION.glob("*.png")):
            run.log_artifact(sheet, "samples")
        run.log_artifact(paths.EVALUATION / CONFUSIONS)
        run.log_artifact(paths.EVALUATION / "record.json")
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
    sections = {name: type(getattr(config, name)).model_validate(values) for name, values in old.settings.items()}
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
