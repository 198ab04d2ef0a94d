"""A whole evaluation: measures the models in ``models/`` under a written contract, and reproduces the scores of a record."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import ValidationError

from cm3leon.config import paths
from cm3leon.config.schema import DOWNLOAD, Config
from cm3leon.data.images import fit_square
from cm3leon.data.manifest import ImageStore, read_manifest
from cm3leon.data.near_duplicates import Likeness
from cm3leon.data.pixels import ImageSet
from cm3leon.evaluation import leakage
from cm3leon.evaluation.context import Evaluation, Sheet, sample_rows
from cm3leon.evaluation.image_tasks import infill, other_prompts, text_to_image
from cm3leon.evaluation.inception import Inception, fetch_weights
from cm3leon.evaluation.pictures import Pictures
from cm3leon.evaluation.record import TOLERANCE, Record, digest
from cm3leon.evaluation.tasks import MEASURES
from cm3leon.evaluation.text_tasks import Asked, answer_vqa, caption, sample_questions, training_answers
from cm3leon.evaluation.upscaling import restoration_scores
from cm3leon.generation.generator import Generator
from cm3leon.models.clip import Encoder
from cm3leon.models.super_resolution import target_side
from cm3leon.retrieval.index import MemoryBank
from cm3leon.scenes import composition
from cm3leon.tracking.lineage import content_hash
from cm3leon.utils.device import default_device
from cm3leon.utils.errors import UserError
from cm3leon.utils.images import save_captioned
from cm3leon.utils.world import ALONE, World

CONFUSIONS = "confusions.csv"
"""Table of the attributes that prompts state and images show (:func:`cm3leon.scenes.composition.confusions`)."""
OTHERS = 0.25
"""Prompts that stand in training, as a share of those that do not; and prompts of new combinations, as a share of these."""
SECTIONS = ("evaluate", "decoding", "retrieve")
"""Sections of the parameters on which scores of the stages' outputs depend; the record repeats them."""
MODELS = (
    paths.FINETUNED, paths.IMAGE_TOKENIZER, paths.TEXT_TOKENIZER, paths.ENCODER, paths.INDEX, paths.TOKENS, paths.SUPER_RESOLUTION
)  # fmt: skip


def load_generator(config: Config, model: Path = paths.FINETUNED) -> Generator:
    """The generator on the stages' outputs; ``model`` is the decoder's directory."""
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


def contract(
    config: Config,
    rows: pd.DataFrame,
    captioned: pd.DataFrame,
    asked: Sequence[Asked],
    image_size: int,
    side: int,
    encoder: str,
    inception: str | None,
) -> dict[str, Any]:
    """What was asked, and how it was measured. Scores are comparable if their contracts are equal.

    What belongs to the model is not in it, such as decoding settings and the rules of retrieval: they are what is compared.

    Args:
        rows: records with their prompts and the kinds of these, as columns ``prompt`` and ``kind``.
        captioned: records whose images are captioned.
        image_size: side of the generated images, pixels.
        side: side of the images on which the upscaler is measured, pixels.
        encoder, inception: fingerprints of the networks that measure.
    """
    counts = {"prompts": len(rows), **{kind: int((rows["kind"] == kind).sum()) for kind in ("seen_prompts", "new_combinations")}}
    counts |= {"captioned": len(captioned), "questions": len(asked)}
    references = [list(texts) for texts in captioned["captions"]]
    return {
        "images": digest(rows["id"].tolist()),
        "prompts": digest(rows[["prompt", "kind"]].to_numpy().tolist()),
        "captioned": digest(captioned["id"].tolist()),
        "references": digest(references),
        "questions": digest([[item.key, item.question, item.answers] for item in asked]),
        "counts": counts,
        "seed": config.evaluate.seed,
        "image_path": f"fit_square to {image_size} px, Lanczos, no file format between",
        "super_resolution": f"bicubic reductions of images of {side} px; Y without a border as wide as the scale",
        "features": f"open_clip image tower {encoder}",
        "inception": inception,
        "bootstrap": config.evaluate.bootstrap,
    }


def measure_upscaler(e: Evaluation, ids: Sequence[str], refs: Sequence[str], side: int) -> None:
    """PSNR (RGB and Y) and SSIM (Y) of the upscaler on bicubic reductions of the images. Calibration: bicubic interpolation."""
    assert e.generator.super_resolution is not None
    values = restoration_scores(e.generator.super_resolution, ImageSet(e.store, refs, side))
    for name in ("psnr_rgb", "psnr_y", "ssim_y"):
        if name in values:
            e.add(f"super_resolution_{name}", ids, values[name])
            e.calibrate(f"super_resolution_{name}_bicubic", values[f"{name}_bicubic"])


def inception_of(weights: str | None) -> Inception | None:
    """The FID network as ``evaluate.inception`` names it: a path, or :data:`~cm3leon.config.schema.DOWNLOAD`."""
    if weights is None:
        return None
    try:
        return Inception.load(fetch_weights() if weights == DOWNLOAD else Path(weights)).to(default_device())
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"evaluate.inception {weights}: {error}") from None


def evaluate(config: Config, output: Path, model: Generator | None = None, processes: World = ALONE) -> Record:
    """Measure a model on the test split; writes the record, sheets and the table of confusions to ``output``.

    Tasks that the model was not tuned for are not measured.

    Args:
        model: with its own settings of decoding and retrieval; None takes the stages' outputs and ``config``'s settings. All models are
            measured by the encoder in ``models/``, so that their scores are comparable. Test records that another model has seen in
            training are named in its record.
        processes: all of them call this; the first one writes.

    Raises:
        LeakageError: if test records are also in training or in the memory bank.
        UserError: if the FID network's weights cannot be loaded.
    """
    # 1. The model and the FID network. What cannot be loaded is an error before anything is generated.
    section = config.evaluate
    generator = model or load_generator(config)
    encoder = Encoder.load(paths.ENCODER).to(default_device()) if model else generator.encoder
    assert encoder is not None and generator.super_resolution is not None and generator.memory is not None
    with processes.first_alone():
        inception = inception_of(section.inception)

    # 2. Test records, which the model must not have seen. The memory bank holds all records that a model was trained on.
    store = ImageStore(paths.RAW)
    test, train = read_manifest(paths.VALIDATED, "test"), read_manifest(paths.VALIDATED, "train", ["id", "captions", "questions"])
    test_ids, known = test["id"].tolist(), generator.memory.bank.documents["id"].tolist()
    likeness, seen = Likeness.of(config.validate_), []
    if model:
        collection = read_manifest(paths.VALIDATED, columns=["id"])["id"].tolist()
        seen = leakage.seen(test_ids, collection, known, paths.VALIDATED, likeness)
    elif processes.rank == 0:  # the thumbnails of a large collection are gigabytes, and more while they are compared
        leakage.check(test_ids, train["id"].tolist(), known, paths.VALIDATED, likeness)
    if section.max_training_similarity is not None:
        test = _unlike_training(test, store, encoder, generator.image_size, section.max_training_similarity, processes)

    # 3. What is asked: it is fixed by the seed, and its digests are the contract.
    prompted = sample_prompts(test, leakage.Known.of(train["captions"]), section.prompts, section.seed)
    rows = pd.concat(prompted.values())
    captioned = sample_rows(test, section.captions, section.seed)
    asked = sample_questions(test, section.questions, section.seed)
    side = target_side(rows, generator.image_size, generator.super_resolution.scale)
    networks = (encoder.fingerprint, inception.fingerprint if inception else None)
    record = Record(
        contract=contract(config, rows, captioned, asked, generator.image_size, side, *networks),
        settings={} if model else {name: getattr(config, name).model_dump(mode="json") for name in SECTIONS},
        models={} if model else {str(path): content_hash(path) for path in MODELS},
        seen=seen,
    )

    # 4. Measurements of the upscaler and of every task that the model was tuned for; inpainting is learned in pretraining.
    evaluation = Evaluation(config, generator, encoder, store, test, record, processes)
    ids, refs = rows["id"].tolist(), rows["image"].tolist()
    measure_upscaler(evaluation, ids, refs, side)
    sheets: dict[str, Sheet] = {}
    if "text_to_image" in generator.trained_tasks:
        sheets["samples"], confusions = _measure_prompts(evaluation, prompted, inception)
    if "caption" in generator.trained_tasks:
        sheets["captions"] = caption(evaluation, captioned)
    if asked and "vqa" in generator.trained_tasks:
        sheets["vqa"] = answer_vqa(evaluation, asked, training_answers(train))
    sheets |= {name: measure_task(evaluation) for name, measure_task in MEASURES.items() if name in generator.trained_tasks}
    sheets["infill"] = infill(evaluation)

    # 5. The record, sheets of images, and the table of confusions.
    if processes.rank > 0:
        return record
    for old in [*output.glob("*.png"), output / CONFUSIONS]:  # an earlier evaluation, of another model
        old.unlink(missing_ok=True)
    record.write(output)
    for name, shown in sheets.items():
        if shown:
            images, texts = zip(*shown[: section.sheet], strict=True)
            save_captioned(images, texts, output / f"{name}.png")
    if "samples" in sheets:
        (output / CONFUSIONS).write_text(confusions)
    return record


def _unlike_training(
    test: pd.DataFrame, store: ImageStore, encoder: Encoder, size: int, similarity: float, processes: World
) -> pd.DataFrame:
    """The test records whose images are not too similar to one of training, by the embeddings in the memory bank of this project.

    Each process compares its part of them. All have to leave out the same ones, whatever the rounding on their GPUs.
    """
    bank = MemoryBank.load(paths.INDEX)
    own = test["image"].iloc[processes.part(len(test))]
    pictures = Pictures(len(own), lambda part: [fit_square(store.open(ref), size) for ref in own.iloc[part]])
    found = processes.gather(leakage.like_training(encoder.encode_images(pictures), bank.image, similarity).tolist())
    like = np.array([value for part in found for value in part], dtype=bool)
    if like.all():
        raise UserError(
            f"all {len(test)} test images are like one of training: the cosine of their embeddings is above "
            f"evaluate.max_training_similarity {similarity}; raise it, or set it to null"
        )
    if processes.rank == 0:
        print(f"{like.sum()} of {len(like)} test records are left out: their images are like one of training", flush=True)
    return test[~like].reset_index(drop=True)


def sample_prompts(test: pd.DataFrame, known: leakage.Known, count: int, seed: int) -> dict[leakage.Kind, pd.DataFrame]:
    """Records whose captions are prompts, with the columns ``prompt`` and ``kind``.

    Where most prompts that do not stand in training are of new combinations, training is too small to tell: all count as unseen.

    Returns:
        unseen: up to ``count`` records. seen_prompts, new_combinations: :data:`OTHERS` times as many; or ``count`` where there are no
        unseen ones.
    """
    chosen = [known.choose_prompt(captions) for captions in test["captions"]]
    table = test.assign(prompt=[text for text, _ in chosen], kind=np.array([kind for _, kind in chosen], dtype=object))
    if (table["kind"] == "new_combinations").sum() > (table["kind"] == "unseen").sum():
        table["kind"] = table["kind"].replace("new_combinations", "unseen")
    others = math.ceil(count * OTHERS) if (table["kind"] == "unseen").any() else count
    counts: dict[leakage.Kind, int] = {"unseen": count, "seen_prompts": others, "new_combinations": others}
    return {kind: sample_rows(table[table["kind"] == kind], most, seed) for kind, most in counts.items()}


def _measure_prompts(e: Evaluation, prompted: dict[leakage.Kind, pd.DataFrame], inception: Inception | None) -> tuple[Sheet, str]:
    """Text to image of prompts that do not stand in training, which give the main scores, and of the other kinds.

    Returns:
        Images for a sheet, and the table of confusions, of the former; of the first other kind if there are none.
    """
    if prompted["unseen"].empty:
        e.say("text_to_image: every prompt stands in training or is of a new combination; these have scores of their own")
    shown: Sheet = []
    confusions = ""
    for kind, rows in prompted.items():
        if rows.empty:
            continue
        ids, refs, prompts = rows["id"].tolist(), rows["image"].tolist(), [e.generator.shorten(text) for text in rows["prompt"]]
        if kind == "unseen":
            generated = text_to_image(e, ids, refs, prompts, inception)
        else:
            generated = other_prompts(e, ids, refs, prompts, kind)
        if not shown:
            shown = list(zip(generated[: e.config.evaluate.sheet], prompts, strict=False))
            confusions = composition.confusions(prompts, generated)
    return shown, confusions


def headline(record: Record) -> dict[str, float]:
    """The scores and calibrations for the final table, without breakdowns by attribute or kind."""
    breakdowns = ("bleu_1", "bleu_2", "bleu_3", "composition/", "vqa_accuracy/", "condition/agreement/")
    main = {name: value for name, value in record.scores.items() if not name.startswith(breakdowns)}
    return {**main, **record.calibration}


Difference = tuple[str, float | None, float | None]
"""A score's name, the recorded and the new score; None if a record has no such score."""


def recorded_config(config: Config, record: Record, origin: str) -> Config:
    """The parameters with the sections of a record's settings; ``origin`` names the record in errors.

    Raises:
        UserError: if the record has no settings, or some that the present code does not have.
    """
    if set(record.settings) != set(SECTIONS):
        raise UserError(f"{origin} does not say with which settings it was made; run cm3leon evaluate to write one that does")
    try:
        sections = {name: type(getattr(config, name)).model_validate(values) for name, values in record.settings.items()}
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, found["loc"])) for found in error.errors())
        raise UserError(
            f"{origin} was made by other code, with settings that this code does not have: {wrong}; run cm3leon evaluate to write a new one"
        ) from None
    return config.model_copy(update=sections)


def reproduce(config: Config, path: Path, processes: World = ALONE) -> tuple[int, list[Difference]]:
    """Evaluate again with the settings of a record, and compare every score and calibration.

    Args:
        processes: all of them call this.

    Returns:
        The number of scores and calibrations, and those that differ; 0 and none of a process other than the first.

    Raises:
        UserError: if ``path`` is not an evaluation record with settings, or one of other models than those in ``models/``, other data or
            other code.
    """
    # 1. The record, and whether it is one of the models, settings and code that are here.
    try:
        old = Record.read_file(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not an evaluation record ({error}); evaluate writes models/evaluation/record.json") from None
    again = recorded_config(config, old, str(path))
    if changed := [str(model) for model in MODELS if old.models.get(str(model)) != content_hash(model)]:
        raise UserError(
            f"{path} was made with other models: {', '.join(changed)} changed since; check out those of the record (dvc checkout)"
        )

    # 2. A new evaluation. Its record is read from the file, where scores are rounded like those of the old one.
    with tempfile.TemporaryDirectory() as folder:
        evaluate(again, Path(folder), processes=processes)
        if processes.rank > 0:
            return 0, []
        new = Record.read(Path(folder))
    if changed := sorted(name for name in old.contract | new.contract if old.contract.get(name) != new.contract.get(name)):
        raise UserError(f"{path} was made on other data or code: its contract differs in {', '.join(changed)}")

    # 3. The differences.
    pairs = [*_paired("", old.scores, new.scores), *_paired("calibration ", old.calibration, new.calibration)]
    return len(pairs), [pair for pair in pairs if not _agree(pair)]


def _agree(pair: Difference) -> bool:
    _, recorded, new = pair
    return recorded is not None and new is not None and math.isclose(recorded, new, abs_tol=TOLERANCE)


def _paired(prefix: str, old: dict[str, float], new: dict[str, float]) -> list[Difference]:
    return [(prefix + name, old.get(name), new.get(name)) for name in sorted(old | new)]
