"""Scores of generated images, captions and answers from the metrics, with their calibration.

Each function adds its scores to the evaluation record, and as calibration what the same metric gives for a known input: real images and
their reconstructions (ceilings), and the captions, images or answers of *other* records (baselines).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image

from cm3leon.evaluation import captions as caption_metrics
from cm3leon.evaluation import vqa
from cm3leon.evaluation.alignment import ImageEncoder, TextImageEncoder
from cm3leon.evaluation.fidelity import covered, frechet_distance, kernel_distance
from cm3leon.evaluation.record import Outcomes, Record, keyed
from cm3leon.scenes import composition

Images = Sequence[Image.Image]

NEIGHBORS = 5
"""The neighbor whose distance is the radius within which a real image is covered."""
SUBSET, SUBSETS = 1000, 20
"""Images in a subset for the kernel distance, and the number of subsets that are averaged."""

DISTANCE_RESAMPLES, WIDEST = 50, 512
"""Resamples for intervals of distances, and the widest features for which they are computed: the cost grows with the cube of the width."""

KINDS = 12
"""Kinds of questions, the most frequent first, that get a score of their own."""
KIND_CHARACTERS = 40
"""Most characters of a kind's name in the name of its score."""


def shifted_positions(count: int) -> np.ndarray:
    """Positions half of the list further: baselines pair each record with what belongs to another one. Needs two or more records.

    The next record may be an edited version of the same image.
    """
    return (np.arange(count) + count // 2) % count


def measure_composition(
    record: Record,
    ids: Sequence[str],
    prompts: Sequence[str],
    generated: Images,
    reconstructions: Images,
    originals: Images,
    resamples: int,
    seed: int,
) -> None:
    """Composition accuracy of prompts that describe scenes: the fraction of images with every stated attribute right, 0 to 1.

    Calibration: the original images (ceiling of the reader), their reconstructions (ceiling of the image tokenizer), and the generated
    images checked against the captions of other records (baseline). Without prompts that describe scenes no score is added.

    Args:
        ids: of the records whose captions are the prompts, here and below; no id may occur twice.
    """
    outcomes = composition.check_images(prompts, generated)
    counted = [outcome for outcome in outcomes if outcome is not None]
    if not counted:
        return
    record.scores["composition/prompts"] = float(len(counted))
    for name, values in composition.by_attribute(outcomes).items():
        record.add(name, {ids[position]: value for position, value in values.items()}, resamples, seed, share=True)
    record.calibration["composition_real"] = composition.score(prompts, originals)["composition"]
    record.calibration["composition_reconstructions"] = composition.score(prompts, reconstructions)["composition"]
    if len(prompts) > 1:
        other_captions = [prompts[i] for i in shifted_positions(len(prompts))]
        record.calibration["composition_other_captions"] = composition.score(other_captions, generated)["composition"]


def measure_images(
    record: Record,
    encoder: TextImageEncoder,
    ids: Sequence[str],
    prompts: Sequence[str],
    generated: Images,
    reconstructions: Images,
    originals: Images,
    resamples: int,
    seed: int,
) -> None:
    """CLIP score, the mean cosine of image and prompt embeddings, and fidelity on the encoder's image features.

    Calibration: the CLIP score of the original images (ceiling) and of other records' captions (baseline). Distances and baselines need
    two images.
    """
    # Embeddings (n, d) have unit length, so inner products are cosines.
    texts_ND = encoder.encode_texts(list(prompts))
    generated_ND = encoder.encode_images(generated)
    real_ND = encoder.encode_images(originals)
    record.add("clip_score", keyed(ids, (generated_ND * texts_ND).sum(1)), resamples, seed)
    record.calibration["clip_score_real"] = float((real_ND * texts_ND).sum(1).mean())
    if len(texts_ND) < 2:
        return
    record.calibration["clip_score_other_captions"] = float((generated_ND * texts_ND[shifted_positions(len(texts_ND))]).sum(1).mean())
    measure_fidelity(record, "encoder", encoder, ids, generated, reconstructions, originals, resamples, seed)


def measure_fidelity(
    record: Record,
    extractor: str,
    network: ImageEncoder,
    ids: Sequence[str],
    generated: Images,
    reconstructions: Images,
    originals: Images,
    resamples: int,
    seed: int,
) -> None:
    """Fréchet and kernel distance (lower is better) and coverage on the features of a network, whose name ends the scores' names.

    The kernel distance is unbiased, which matters where there are too few images for a Fréchet distance. Intervals of distances are over
    resampled generated images, for features no wider than :data:`WIDEST`. Calibration: reconstructions, and one half of the originals
    against the other.
    """
    if len(originals) < 2:
        return
    found, copies, real = (network.encode_images(images) for images in (generated, reconstructions, originals))

    # 1. Distances, with intervals. A Fréchet distance is never negative, the shifted interval's lower end could be.
    subset = min(SUBSET, len(real))
    record.scores[f"fd_{extractor}"] = frechet_distance(found, real)
    record.scores[f"kd_{extractor}"] = kernel_distance(found, real, SUBSETS, subset, seed)
    record.calibration[f"fd_{extractor}_reconstructions"] = frechet_distance(copies, real)
    record.calibration[f"kd_{extractor}_reconstructions"] = kernel_distance(copies, real, SUBSETS, subset, seed)
    if real.shape[1] <= WIDEST:
        record.add_intervals(
            (f"fd_{extractor}", f"kd_{extractor}"),
            lambda rows: (frechet_distance(found[rows], real), kernel_distance(found[rows], real, SUBSETS, subset, seed)),
            len(found),
            DISTANCE_RESAMPLES,
            seed,
        )
        low, high = record.intervals[f"fd_{extractor}"]
        record.intervals[f"fd_{extractor}"] = (max(low, 0.0), high)

    # 2. Coverage and the distance between halves, which need enough originals.
    if len(real) // 2 > NEIGHBORS:
        record.add(f"coverage_{extractor}", keyed(ids, covered(real, found, NEIGHBORS)), resamples, seed, share=True)
        half = len(real) // 2
        record.calibration[f"fd_{extractor}_real_halves"] = frechet_distance(real[:half], real[half:])
        record.calibration[f"kd_{extractor}_real_halves"] = kernel_distance(real[:half], real[half:], SUBSETS, half, seed)
        record.calibration[f"coverage_{extractor}_reconstructions"] = float(covered(real, copies, NEIGHBORS).mean())
        record.calibration[f"coverage_{extractor}_real_halves"] = float(covered(real[:half], real[half:], NEIGHBORS).mean())


def measure_captions(
    record: Record, ids: Sequence[str], hypotheses: Sequence[str], references: Sequence[Sequence[str]], resamples: int, seed: int
) -> None:
    """CIDEr, BLEU and ROUGE-L of captions.

    Calibration: the same captions against the references of other records (baseline); and for records with several references, the first
    reference against the others, which is what another description of the same image scores, and the model's captions against those others.
    """
    # 1. Scores. BLEU is not a mean over images, so its intervals resample the counts of which it is made.
    wanted = {id_: list(texts) for id_, texts in zip(ids, references, strict=True)}
    given = dict(zip(ids, hypotheses, strict=True))
    counts = caption_metrics.bleu_counts(*caption_metrics.split(given, wanted, False))
    record.scores |= dict(zip(caption_metrics.BLEU, caption_metrics.bleu_of(counts), strict=True))
    record.add_intervals(caption_metrics.BLEU, lambda rows: caption_metrics.bleu_of(counts[rows]), len(counts), resamples, seed)
    for name, values in caption_metrics.per_image(given, wanted).items():
        record.add(name, keyed(ids, values), resamples, seed)

    # 2. A person's caption and the model's against the same remaining references.
    several = {id_: texts for id_, texts in wanted.items() if len(texts) > 1}
    if len(several) > 1:
        first = {id_: texts[0] for id_, texts in several.items()}
        rest = {id_: texts[1:] for id_, texts in several.items()}
        own = {id_: given[id_] for id_ in several}
        record.calibration["cider_one_reference"] = caption_metrics.score(first, rest)["cider"]
        record.calibration["cider_beside_one_reference"] = caption_metrics.score(own, rest)["cider"]

    # 3. The model's captions against the references of other records.
    if len(ids) < 2:
        return
    shifted = {id_: hypotheses[i] for id_, i in zip(ids, shifted_positions(len(ids)), strict=True)}
    record.calibration["cider_other_images"] = caption_metrics.score(shifted, wanted)["cider"]


def question_kind(question: str) -> str:
    """The first two words of a question as a metric name that MLflow accepts: the breakdown of VQA accuracy."""
    words = " ".join(question.lower().split()[:2])
    return re.sub(r"[^\w]+", "_", words).strip("_")[:KIND_CHARACTERS] or "other"


def images_of_others(images: Sequence[str]) -> list[str] | None:
    """For the image of each question another one, from half of the list further on; None if all questions are about the same image."""
    others: list[str] = []
    for image, start in zip(images, shifted_positions(len(images)), strict=True):
        other = next((other for other in [*images[start:], *images[:start]] if other != image), None)
        if other is None:
            return None
        others.append(other)
    return others


def measure_answers(
    record: Record,
    questions: Sequence[str],
    answers: Sequence[str],
    answers_of_others: Sequence[str] | None,
    truths: Sequence[Sequence[str]],
    keys: Sequence[str],
    training_answers: Counter[tuple[str, str]],
    resamples: int,
    seed: int,
) -> None:
    """VQA accuracy, 0 to 1, overall and for the most frequent kinds of questions.

    Intervals resample whole images, as an image may have several questions.

    Calibration (baselines): the answers given to the same questions about *other* images, and the most frequent training answer of each
    question, or of its kind where training does not ask it.

    Args:
        answers_of_others: the answers about other images; None if there are no other images.
        truths: the reference answers of each question.
        keys: of each question: the id of its record, ``#`` and its number.
        training_answers: counts of (question, answer) in training.
    """

    def scores_of(given: Sequence[str]) -> list[float]:
        return [vqa.accuracy({"q": answer}, {"q": list(truth)}) / 100 for answer, truth in zip(given, truths, strict=True)]

    # 1. Overall, and by kind of question.
    scores = scores_of(answers)
    outcomes = keyed(keys, scores)
    record.add("vqa_accuracy", outcomes, resamples, seed, share=True)
    by_kind: dict[str, Outcomes] = defaultdict(dict)
    for question, (key, score) in zip(questions, outcomes.items(), strict=True):
        by_kind[question_kind(question)][key] = score
    frequent = sorted(by_kind.items(), key=lambda item: (-len(item[1]), item[0]))[:KINDS]
    for kind, found in frequent:
        record.add(f"vqa_accuracy/{kind}", found, resamples, seed, share=True)

    # 2. Baselines that do not see the image.
    if answers_of_others is not None:
        record.calibration["vqa_accuracy_other_images"] = float(np.mean(scores_of(answers_of_others)))
    counts_by_kind: Counter[tuple[str, str]] = Counter()
    for (question, answer), count in training_answers.items():
        counts_by_kind[question_kind(question), answer] += count
    majority: dict[str, str] = {}  # of questions, and of kinds
    for (asked, answer), _ in [*training_answers.most_common(), *counts_by_kind.most_common()]:
        majority.setdefault(asked, answer)
    majority_answers = [majority.get(question, majority.get(question_kind(question), "")) for question in questions]
    record.calibration["vqa_accuracy_majority"] = float(np.mean(scores_of(majority_answers)))
