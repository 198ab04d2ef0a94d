"""Stage ``evaluate``: what the finished model can do, measured on the test split under a written contract."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from cm3leon import paths, super_resolution, tracking
from cm3leon.config import Config
from cm3leon.data.images import fit_square
from cm3leon.data.manifest import ImageStore, read_manifest
from cm3leon.data.pixels import ImageSet
from cm3leon.evaluation import measure
from cm3leon.evaluation.record import Record, digest
from cm3leon.generation.generator import Generator
from cm3leon.stages.common import save_captioned
from cm3leon.stages.super_resolution import target_side
from cm3leon.tokenizers.image import reconstruct

SAMPLES = "samples.png"
CAPTIONED = "captions.png"


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


def first_caption(captions: Sequence[str]) -> str:
    """The first that is not blank; ``validate`` lets no document pass without."""
    return next(text for text in map(str, captions) if text.strip())


def answer_all(generator: Generator, store: ImageStore, refs: Sequence[str], questions: Sequence[str]) -> list[str]:
    """An answer to each question about its image; questions too long for the context lose their end."""
    images = fitted(generator, store, refs)
    return [answer.text for answer in generator.answer(images, [generator.shorten_question(question) for question in questions])]


def fitted(generator: Generator, store: ImageStore, refs: Sequence[str]) -> list[Image.Image]:
    """The images as the tokenizer takes them."""
    return [fit_square(store.open(ref), generator.image_tokenizer.spec.image_size) for ref in refs]


def measure_upscaler(record: Record, generator: Generator, store: ImageStore, refs: Sequence[str], side: int) -> None:
    """PSNR of reductions of the images, upscaled again, against the images themselves. Calibration: bicubic interpolation."""
    assert generator.super_resolution is not None
    figures = super_resolution.evaluate(generator.super_resolution, ImageSet(store, refs, side))
    record.scores["super_resolution_psnr_rgb"] = figures["psnr_rgb"]
    record.calibration["super_resolution_psnr_rgb_bicubic"] = figures["psnr_rgb_bicubic"]


def contract(
    config: Config, rows: pd.DataFrame, prompts: list[str], captioned: pd.DataFrame, asked: list[Any], generator: Generator, side: int
) -> dict[str, Any]:
    """What was asked and how: equal contracts make scores comparable. ``side``: of the images the upscaler is measured on, pixels."""
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
        "retrieval": config.retrieve.model_dump() if config.decoding.documents else None,
        "image_path": f"fit_square to {generator.image_tokenizer.spec.image_size} px, Lanczos, no file format between",
        "super_resolution": f"bicubic reductions of images of {side} px",
        "features": f"open_clip image tower {generator.encoder.fingerprint}" if generator.encoder else None,
        "bootstrap": config.evaluate.bootstrap,
    }


def run(config: Config) -> dict[str, float]:
    """Writes ``models/evaluation/record.json`` and sheets; returns the main scores and their calibrations."""
    section = config.evaluate
    resampling = (section.bootstrap, section.seed)
    generator = Generator.from_parts(
        model=paths.FINETUNED,
        image_tokenizer=paths.IMAGE_TOKENIZER,
        text_tokenizer=paths.TEXT_TOKENIZER,
        encoder=paths.ENCODER,
        memory_bank=paths.INDEX,
        tokens=paths.TOKENS,
        super_resolution=paths.SUPER_RESOLUTION,
        decoding=config.decoding,
        retrieval=config.retrieve,
    )
    assert generator.encoder is not None and generator.super_resolution is not None
    store, test = ImageStore(paths.RAW), read_manifest(paths.VALIDATED, "test")
    rows, captioned = choose(test, section.prompts, section.seed), choose(test, section.captions, section.seed)
    prompts = [generator.shorten(first_caption(captions)) for captions in rows["captions"]]
    originals = fitted(generator, store, rows["image"].tolist())
    _, pixels = reconstruct(generator.image_tokenizer, torch.from_numpy(np.stack([np.asarray(image) for image in originals])))
    reconstructions = [Image.fromarray(array) for array in pixels.numpy()]
    asked = ask_questions(test, section.questions, section.seed)
    side = target_side(rows, generator.image_tokenizer.spec.image_size, generator.super_resolution.scale)

    record = Record(contract=contract(config, rows, prompts, captioned, asked, generator, side))
    with tracking.stage_run("evaluate", config) as run:
        drawn = [images[0].image for images in generator.text_to_image(prompts, seed=section.seed)]
        measure.measure_composition(record, prompts, drawn, reconstructions, originals, *resampling)
        measure.measure_images(record, generator.encoder, prompts, drawn, reconstructions, originals, *resampling)
        measure_upscaler(record, generator, store, rows["image"].tolist(), side)
        pictures = fitted(generator, store, captioned["image"].tolist())
        captions = [caption.text for caption in generator.caption(pictures)]
        measure.measure_captions(record, captioned["id"].tolist(), captions, [list(texts) for texts in captioned["captions"]])
        if asked:
            questions, truths = [question for _, question, _ in asked], [truth for _, _, truth in asked]
            answers, others = answer_all(generator, store, [ref for ref, _, _ in asked], questions), measure.pictures_of_others(asked)
            answers_of_others = answer_all(generator, store, others, questions) if others else None
            known = training_answers(read_manifest(paths.VALIDATED, "train"))
            measure.measure_answers(record, questions, answers, answers_of_others, truths, known, *resampling)
        record.write(paths.EVALUATION)
        save_captioned(drawn[: section.sheet], prompts[: section.sheet], paths.EVALUATION / SAMPLES)
        save_captioned(pictures[: section.sheet], captions[: section.sheet], paths.EVALUATION / CAPTIONED)
        run.log_metrics({f"eval/{name}": value for name, value in record.scores.items()})
        run.log_metrics({f"calibration/{name}": value for name, value in record.calibration.items()})
        for name in (SAMPLES, CAPTIONED):
            run.log_artifact(paths.EVALUATION / name, "samples")
        run.log_artifact(paths.EVALUATION / "record.json")
    return headline(record)


def headline(record: Record) -> dict[str, float]:
    """The scores and calibrations worth a line in the final table."""
    main = {name: value for name, value in record.scores.items() if "/" not in name and name not in ("bleu_1", "bleu_2", "bleu_3")}
    return {**main, **record.calibration}
