"""The claims of the paper: the paper's result, the measurement here, and a verdict.

A claim holds if all seeds agree, if intervals do not overlap, or if the paired difference over prompts has an interval above 0. Otherwise
the verdict is "undecided".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.study.runs import Study
from cm3leon.config import paths
from cm3leon.config.schema import DecodingConfig
from cm3leon.data.manifest import ImageStore, read_manifest
from cm3leon.evaluation import measure
from cm3leon.evaluation.context import Evaluation, best_images, fitted_images, sample_rows
from cm3leon.evaluation.image_tasks import infill
from cm3leon.evaluation.record import Record
from cm3leon.evaluation.run import load_generator
from cm3leon.evaluation.tasks import MEASURES
from cm3leon.evaluation.text_tasks import answer_questions, sample_questions
from cm3leon.scenes import composition
from cm3leon.tracking.lineage import content_hash

BASE: tuple[str, ...] = ("pretrain.retrieved_documents=[0.2, 0.4, 0.4]",)
ALONE = ("pretrain.retrieved_documents=[1.0]",)
"""Changes to the parameters: pretraining with 0, 1 or 2 retrieved documents at these rates (BASE), or without retrieval (ALONE)."""
SIZES = {
    "small": ("pretrain.model.layers=2", "pretrain.model.width=64", "pretrain.model.heads=2"),
    "medium": (),
    "large": ("pretrain.model.layers=6", "pretrain.model.width=160", "pretrain.model.heads=5"),
}
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
COUNTS = (1, 2, 4, 8, 16, 32)
SAMPLINGS: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "top-p 0.9": {"top_p": 0.9},
    "CD-K, k 4": {"contrastive": 1.0, "contrastive_k": 4},
    "CD-K, k 1": {"contrastive": 1.0, "contrastive_k": 1},
    "half top-p, half CD-K, k 4": {"top_p": 0.9, "contrastive": 0.5, "contrastive_k": 4},
    "half top-p, half CD-K, k 1": {"top_p": 0.9, "contrastive": 0.5, "contrastive_k": 1},
}
"""Sampling strategies. The paper does not state its k; alpha is the default of DecodingConfig."""


@dataclass
class Section:
    """A section of the report.

    Attributes:
        curves: lines of the plot by name, each a list of points (x, y, low, high).
        logarithmic: the axis with a logarithmic scale, x or y.
    """

    title: str
    paper: str
    verdict: str
    table: list[list[str]]
    axes: tuple[str, str] = ("", "")
    curves: dict[str, list[tuple[float, float, float, float]]] = field(default_factory=dict)
    logarithmic: str = ""


def _shown(result: dict[str, Any]) -> str:
    """A mean with its interval, as in the tables."""
    low, high = result["interval"]
    return f"{result['mean']:.3f} [{low:.2f}, {high:.2f}]"


def _better(one: Sequence[float], other: Sequence[float]) -> str:
    """The verdict on "one is higher than the other", by whether every seed of one is above every seed of the other."""
    if min(one) > max(other):
        return "holds here"
    return "does not hold here" if max(one) < min(other) else "undecided here (the seeds overlap)"


def _paired(one: Sequence[float], other: Sequence[float]) -> str:
    """The verdict on "one is higher than the other" from the paired difference over prompts, with its interval."""
    difference = np.asarray(one) - np.asarray(other)
    low, high = _interval(difference)
    verdict = "holds here" if low > 0 else "does not hold here" if high < 0 else "undecided here"
    return f"{verdict} ({difference.mean():+.3f} [{low:+.2f}, {high:+.2f}])"


def _last(curve: Sequence[dict[str, float]], name: str) -> float:
    return curve[-1][name]


def _tokens_to(curve: Sequence[dict[str, float]], name: str, goal: float) -> float | None:
    """Tokens after which a loss has fallen to ``goal``, interpolated between validations; None if it does not."""
    points = [(point["tokens"], point[name]) for point in curve if name in point]
    for (before, high), (after, low) in zip(points, points[1:], strict=False):
        if low <= goal < high:
            return before + (after - before) * (high - goal) / (high - low)
    return None


def retrieval(study: Study) -> Section:
    """(a) With and without retrieval at equal compute."""
    # 1. Decoders and their scores.
    runs = {
        name: [study.trained(name, changes, seed) for seed in range(study.seeds)]
        for name, changes in (("retrieval", BASE), ("no-retrieval", ALONE))
    }
    table = [["trained", "seed", "loss, no documents", "loss, two documents", "composition with 0", "with 1", "with 2 documents"]]
    for name, found in runs.items():
        for seed, (model, trained) in enumerate(found):
            scores = [_shown(study.composition(model, retrieved_documents=count)) for count in (0, 1, 2)]
            losses = [f"{_last(trained['curve'], f'val_{key}_loss'):.3f}" for key in ("alone", "retrieved")]
            table.append([name, str(seed), *losses, *scores])

    # 2. Final losses, each with the documents that the decoder was trained on, and the tokens to the same loss.
    final = {
        name: [_last(t["curve"], key) for _, t in runs[name]]
        for name, key in (("retrieval", "val_retrieved_loss"), ("no-retrieval", "val_alone_loss"))
    }
    goal = float(np.mean(final["no-retrieval"]))
    needed = [_tokens_to(t["curve"], "val_retrieved_loss", goal) for _, t in runs["retrieval"]]
    fractions = [tokens / study.tokens for tokens in needed if tokens is not None]
    compute = (
        f"it reaches the final loss without retrieval after {np.mean(fractions):.2f} of the tokens"
        if fractions
        else "it does not reach the final loss without retrieval"
    )
    documents = [study.composition(model, retrieved_documents=2)["mean"] for model, _ in runs["retrieval"]]
    none = [study.composition(model, retrieved_documents=0)["mean"] for model, _ in runs["no-retrieval"]]

    # 3. Learning curves.
    curves = {
        f"{name}, seed {seed}": [(p["tokens"] / 1e6, p[key], p[key], p[key]) for p in t["curve"]]
        for name, key in (("retrieval", "val_retrieved_loss"), ("no-retrieval", "val_alone_loss"))
        for seed, (_, t) in enumerate(runs[name])
    }
    lower = _better([-x for x in final["retrieval"]], [-x for x in final["no-retrieval"]])
    return Section(
        "(a) Retrieval at equal compute",
        "FID 10.82, 5.78, 4.88 with 0, 1, 2 retrieved documents (7B); retrieval-augmented training needs several times less compute.",
        f"The loss is lower with two retrieved documents: {lower}; {compute}. Composition is higher with two retrieved documents than "
        f"without retrieval: {_better(documents, none)}.",
        table,
        ("million tokens", "validation loss of the query"),
        curves,
        logarithmic="y",
    )


def guidance(study: Study) -> Section:
    """(b) The best guidance scale at three model sizes."""
    table, curves = [["size", *[f"guidance {scale:g}" for scale in SCALES], "best"]], {}
    best: dict[str, float] = {}
    as_good: list[set[float]] = []
    for size, changes in SIZES.items():
        model, _ = study.trained("retrieval" if size == "medium" else f"size-{size}", (*BASE, *changes), 0)
        found = [study.composition(model, 4, guidance=scale) for scale in SCALES]
        highest = max(found, key=lambda result: result["mean"])
        best[size] = SCALES[found.index(highest)]
        as_good.append({scale for scale, r in zip(SCALES, found, strict=True) if r["interval"][1] >= highest["interval"][0]})
        table.append([size, *map(_shown, found), f"{best[size]:g}"])
        curves[size] = [(scale, r["mean"], *r["interval"]) for scale, r in zip(SCALES, found, strict=True)]
    common = sorted(set.intersection(*as_good))
    if len(common) == 1:
        same = "holds here"
    elif common:
        overlapping = ", ".join(f"{scale:g}" for scale in common)
        same = f"undecided here (at {overlapping} the intervals overlap that of the best)"
    else:
        same = "does not hold here"
    scales = ", ".join(f"{size} {scale:g}" for size, scale in best.items())
    return Section(
        "(b) Guidance scale and model size",
        "One guidance scale is used for all sizes.",
        f"One guidance scale is best for all sizes: {same}. The best here: {scales}.",
        table,
        ("guidance scale", "composition of one image"),
        curves,
    )


def candidates(study: Study) -> Section:
    """(c) Sampling strategies with more candidates, of which the one with the highest CLIP score counts."""
    model = paths.FINETUNED
    table, curves = [["sampling", *[f"{count} {'candidate' if count == 1 else 'candidates'}" for count in COUNTS]]], {}
    right: dict[str, list[list[float]]] = {}
    for name, settings in SAMPLINGS.items():
        found = study.kept("candidates", [name, settings, content_hash(model)], functools.partial(_best_of, study, model, settings))
        shown: list[dict[str, Any]] = [{"mean": float(np.mean(values)), "interval": _interval(values)} for values in found]
        table.append([name, *map(_shown, shown)])
        right[name] = found
        curves[name] = [(count, r["mean"], *r["interval"]) for count, r in zip(COUNTS, shown, strict=True)]
    mixture, other = (
        max((name for name in right if name.startswith("half") == mixed), key=lambda name: np.mean(right[name][-1]))
        for mixed in (True, False)
    )
    # Gains from 8 to 32 candidates.
    gains = ", ".join(f"{name} {np.mean(values[-1]) - np.mean(values[-3]):+.3f}" for name, values in right.items())
    return Section(
        "(c) More candidates",
        "Top-p and CD-K alone stagnate as candidates grow; half of each keeps improving.",
        f"With {COUNTS[-1]} candidates the better mixture ({mixture}) is better than the best single strategy ({other}): "
        f"{_paired(right[mixture][-1], right[other][-1])}. It still improves from {COUNTS[-3]} to {COUNTS[-1]} candidates: "
        f"{_paired(right[mixture][-1], right[mixture][-3])}; gains of all: {gains}. With k 4, CD-K keeps every token that is at least "
        f"{DecodingConfig().contrastive_alpha:g} times as likely as the fourth most likely one, so nearly all if the model is confident.",
        table,
        ("candidates, the best by CLIP", "composition"),
        curves,
        logarithmic="x",
    )


def _interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean."""
    record = Record()
    record.add("x", values, 1000, 0)
    return record.intervals["x"]


def _best_of(study: Study, model: Any, settings: dict[str, Any]) -> list[list[float]]:
    """For each number of candidates and prompt, whether the candidate with the highest CLIP score is right, 0 or 1.

    Each number is generated by a call of its own: mixtures sample half of the candidates of a call with each strategy.
    """
    generator, found = study.generator(model), []
    for count in COUNTS:
        best = best_images(generator.text_to_image(study.captions, candidates=count, **settings))
        found.append([float(all(verdict.values())) for verdict in composition.verdicts(study.captions, best) if verdict is not None])
    return found


def masking(study: Study) -> Section:
    """(d) Masks across breaks, and how often a whole segment is masked."""
    variants = {
        "within segments (0.15)": ("pretrain.objective.mean_masks=1.0", "pretrain.objective.segment_rate=0.15"),
        "across breaks (0.15)": (
            "pretrain.objective.mean_masks=1.0", "pretrain.objective.segment_rate=0.15", "pretrain.objective.across_breaks=true"
        ),
        "whole segments never": ("pretrain.objective.mean_masks=1.0", "pretrain.objective.segment_rate=0.0"),
        "whole segments in half": ("pretrain.objective.mean_masks=1.0", "pretrain.objective.segment_rate=0.5"),
    }  # fmt: skip
    table = [
        [
            "masks (rate of whole segments)",
            "seed",
            "loss without retrieval",
            "composition",
            "CIDEr by infilling",
            "composition at guidance 2",
        ]
    ]
    scores: dict[str, list[float]] = {}
    ciders: dict[str, list[float]] = {}
    for name, changes in variants.items():
        scores[name], ciders[name] = [], []
        for seed in range(min(2, study.seeds)):
            model, trained = study.trained(f"masks-{name.split(' (')[0].replace(' ', '-')}", (*ALONE, *changes), seed)
            plain, guided = study.composition(model, 2), study.composition(model, 2, guidance=2.0)
            cider = study.kept("cider", [content_hash(model)], functools.partial(_cider, study, model))
            scores[name].append(plain["mean"])
            ciders[name].append(cider)
            table.append(
                [name, str(seed), f"{_last(trained['curve'], 'val_alone_loss'):.3f}", _shown(plain), f"{cider:.2f}", _shown(guided)]
            )
    within = _better(scores["within segments (0.15)"], scores["across breaks (0.15)"])
    whole = _better(ciders["whole segments in half"], ciders["whole segments never"])
    cost = _better(scores["whole segments never"], scores["whole segments in half"])
    return Section(
        "(d) Masks across breaks, and whole segments",
        "Masks do not cross breaks, which keeps the model from generating images around text; no score is given.",
        f"Composition is higher with masks within segments than with masks across breaks: {within}. Captions by infilling are better if "
        f"whole segments are masked in half of the samples than if they never are: {whole}; this costs composition: {cost}.",
        table,
    )


def _cider(study: Study, model: Any) -> float:
    """CIDEr of captions by infilling of val images."""
    generator = study.generator(model)
    rows = sample_rows(read_manifest(paths.VALIDATED, "val"), study.prompts, 0)
    images = fitted_images(generator, ImageStore(paths.RAW), rows["image"].tolist())
    record = Record()
    captions = [text.text for text in generator.caption(images)]
    measure.measure_captions(record, rows["id"].tolist(), captions, [list(texts) for texts in rows["captions"]], 10, 0)
    return record.scores["cider"]


def tuning(study: Study) -> Section:
    """(e) Before and after instruction tuning, on every task."""
    decoding = study.config.decoding.model_dump(mode="json")
    found = {
        name: study.kept("tasks", [name, content_hash(model), decoding], functools.partial(_all_tasks, study, model))
        for name, model in (("pretrained", paths.PRETRAINED), ("tuned", paths.FINETUNED))
    }
    before, after = found["pretrained"], found["tuned"]
    names = [name for name in after if name in before]
    table = [["score", "pretrained", "tuned"], *[[name, _shown(before[name]), _shown(after[name])] for name in names]]
    higher = [name for name in names if after[name]["interval"][0] > before[name]["interval"][1]]
    lower = [name for name in names if after[name]["interval"][1] < before[name]["interval"][0]]
    return Section(
        "(e) Instruction tuning",
        "Instruction tuning adds image and text tasks that the pretrained model cannot do.",
        f"After tuning {len(higher)} of {len(names)} scores are higher, as intervals do not overlap. Lower: {', '.join(lower) or 'none'}. "
        f"Undecided, as intervals overlap: {', '.join(sorted(set(names) - set(higher) - set(lower))) or 'none'}.",
        table,
    )


def _all_tasks(study: Study, model: Any) -> dict[str, dict[str, Any]]:
    """The main scores of all tasks on the val split, with their intervals."""
    # 1. Tasks with a measurement of their own. Without its list of trained tasks the pretrained model accepts every task.
    config = study.config.model_copy(update={"evaluate": study.config.evaluate.model_copy(update={"tasks": study.prompts})})
    generator, record = load_generator(config, model), Record()
    generator.parts.training = None
    store, val = ImageStore(paths.RAW), read_manifest(paths.VALIDATED, "val")
    evaluation = Evaluation(config, generator, store, val, record)
    for measure_task in (*MEASURES.values(), infill):
        measure_task(evaluation)

    # 2. Text to image, questions and captions.
    bootstrap = (config.evaluate.bootstrap, 0)
    generated = best_images(generator.text_to_image(study.captions))
    for name, values in composition.by_attribute(composition.verdicts(study.captions, generated)).items():
        record.add(name, values, *bootstrap)
    asked = sample_questions(val, 2 * study.prompts, 0)
    refs, questions, truths = zip(*asked, strict=True)
    answers = answer_questions(generator, store, refs, questions)
    measure.measure_answers(record, questions, answers, None, truths, refs, measure.Counter(), *bootstrap)
    captioned = sample_rows(val, study.prompts, 0)
    captions = [text.text for text in generator.caption(fitted_images(generator, store, captioned["image"].tolist()))]
    measure.measure_captions(record, captioned["id"].tolist(), captions, [list(texts) for texts in captioned["captions"]], *bootstrap)

    # 3. Without breakdowns.
    breakdowns = ("vqa_accuracy/", "condition/agreement/", "composition/", "bleu_1", "bleu_2", "bleu_3")
    main = {name: score for name, score in record.scores.items() if not name.startswith(breakdowns)}
    return {name: {"mean": score, "interval": record.intervals[name]} for name, score in main.items()}


def sizes(study: Study) -> Section:
    """(f) Loss and composition at three model sizes."""
    table = [["size", "parameters", "seed", "loss", "composition of one image"]]
    losses: dict[str, list[float]] = {}
    curves = {}
    for size, changes in SIZES.items():
        losses[size] = []
        for seed in range(min(2, study.seeds)):
            model, trained = study.trained("retrieval" if size == "medium" else f"size-{size}", (*BASE, *changes), seed)
            losses[size].append(_last(trained["curve"], "val_alone_loss"))
            table.append([size, f"{trained['parameters']:,}", str(seed), f"{losses[size][-1]:.3f}", _shown(study.composition(model, 4))])
            curves[f"{size}, seed {seed}"] = [
                (p["tokens"] / 1e6, p["val_alone_loss"], *[p["val_alone_loss"]] * 2) for p in trained["curve"]
            ]
    larger = _better([-x for x in losses["large"]], [-x for x in losses["small"]])
    return Section(
        "(f) Model size",
        "Loss and FID fall with size (350M, 760M, 7B) and tokens.",
        f"A larger model has a lower loss after the same number of tokens: {larger}.",
        table,
        ("million tokens", "validation loss"),
        curves,
        logarithmic="y",
    )
