"""Stage ``evaluate``: what the finished model can do, measured on the test split under a written contract."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import torch

from cm3leon import paths, tracking
from cm3leon.config import Config
from cm3leon.data.images import fit_square
from cm3leon.data.manifest import ImageStore, read_manifest
from cm3leon.evaluation import measure
from cm3leon.evaluation.record import Record, digest
from cm3leon.generation.generator import Generator, image_of
from cm3leon.stages.common import save_captioned

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


def answer_all(generator: Generator, store: ImageStore, asked: list[tuple[str, str, list[str]]], shift: int) -> list[str]:
    """Answers to the questions about their own images, or with ``shift`` 1 about the next question's."""
    images = [store.open(asked[(number + shift) % len(asked)][0]) for number in range(len(asked))]
    return generator.answer(images, [question for _, question, _ in asked])


def contract(config: Config, rows: pd.DataFrame, prompts: list[str], asked: list[Any], generator: Generator) -> dict[str, Any]:
    """What was asked and how: equal contracts make scores comparable."""
    return {
        "images": digest(rows["id"].tolist()),
        "prompts": digest(prompts),
        "questions": digest(asked),
        "counts": {"prompts": len(prompts), "questions": len(asked)},
        "seed": config.evaluate.seed,
        "decoding": config.decoding.model_dump(),
        "image_path": f"fit_square to {generator.image_tokenizer.spec.image_size} px, Lanczos, no file format between",
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
        decoding=config.decoding,
    )
    assert generator.encoder is not None
    store, test = ImageStore(paths.RAW), read_manifest(paths.VALIDATED, "test")
    rows = choose(test, section.prompts, section.seed)
    prompts = [str(captions[0]) for captions in rows["captions"]]
    originals = [fit_square(store.open(ref), generator.image_tokenizer.spec.image_size) for ref in rows["image"]]
    reconstructions = image_of(generator.image_tokenizer.decode(torch.from_numpy(generator.encode(originals)).to(generator.model.device)))
    asked = ask_questions(test, section.questions, section.seed)

    record = Record(contract=contract(config, rows, prompts, asked, generator))
    with tracking.stage_run("evaluate", config) as run:
        drawn = [images[0].image for images in generator.text_to_image(prompts, seed=section.seed)]
        measure.measure_composition(record, prompts, drawn, reconstructions, originals, *resampling)
        measure.measure_images(record, generator.encoder, prompts, drawn, reconstructions, originals, *resampling)
        captioned = choose(test, section.captions, section.seed)
        pictures = [store.open(ref) for ref in captioned["image"]]
        captions = generator.caption(pictures)
        measure.measure_captions(record, captioned["id"].tolist(), captions, [list(texts) for texts in captioned["captions"]])
        if asked:
            answers, answers_of_others = answer_all(generator, store, asked, 0), answer_all(generator, store, asked, 1)
            truths = [truth for _, _, truth in asked]
            known = training_answers(read_manifest(paths.VALIDATED, "train"))
            measure.measure_answers(record, [q for _, q, _ in asked], answers, answers_of_others, truths, known, *resampling)
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
