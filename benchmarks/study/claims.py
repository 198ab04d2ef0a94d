"""The paper's claims: for each the claim, how it is measured, and whether it holds here."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.measurements import correct_by_candidates, infilling_cider, task_scores
from benchmarks.study.runs import RESAMPLES, Study
from benchmarks.study.section import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Section,
    every_seed_higher,
    every_seed_lower,
    paired_difference,
    tokens_to_loss,
    with_interval,
)
from cm3leon.config import paths
from cm3leon.config.schema import DecodingConfig
from cm3leon.evaluation.record import bootstrap
from cm3leon.tracking.lineage import content_hash

RETRIEVAL: tuple[str, ...] = ("pretrain.retrieved_documents=[0.2, 0.4, 0.4]",)
NO_RETRIEVAL = ("pretrain.retrieved_documents=[1.0]",)
"""Shares of training samples with 0, 1 and 2 retrieved documents."""
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
"""The paper does not publish its k; alpha has its default."""
MASKS = {
    "within segments (0.15)": ("pretrain.objective.mean_masks=1.0", "pretrain.objective.segment_rate=0.15"),
    "across breaks (0.15)": (
        "pretrain.objective.mean_masks=1.0", "pretrain.objective.segment_rate=0.15", "pretrain.objective.across_breaks=true"
    ),
    "whole segments never": ("pretrain.objective.mean_masks=1.0", "pretrain.objective.segment_rate=0.0"),
    "whole segments in half": ("pretrain.objective.mean_masks=1.0", "pretrain.objective.segment_rate=0.5"),
}  # fmt: skip


def retrieval(study: Study) -> Section:
    """(a) Pretraining with and without retrieval, at equal compute."""
    # Each is judged as it was trained: on the query after two documents, or on the query alone.
    losses = {"retrieval": "val_retrieved_loss", "no-retrieval": "val_alone_loss"}
    runs = {
        name: [study.trained(name, changes, seed) for seed in range(study.seeds)]
        for name, changes in (("retrieval", RETRIEVAL), ("no-retrieval", NO_RETRIEVAL))
    }
    table = [["trained", "seed", "loss, no documents", "loss, two documents", "composition with 0", "with 1", "with 2 documents"]]
    curves = {}
    final: dict[str, list[float]] = {name: [] for name in runs}
    for name, seeds in runs.items():
        for seed, (model, trained) in enumerate(seeds):
            curve = trained["curve"]
            scores = [with_interval(study.composition(model, retrieved_documents=count)) for count in (0, 1, 2)]
            alone, retrieved = (f"{curve[-1][f'val_{key}_loss']:.3f}" for key in ("alone", "retrieved"))
            table.append([name, str(seed), alone, retrieved, *scores])
            final[name].append(curve[-1][losses[name]])
            curves[f"{name}, seed {seed}"] = [_point(point, losses[name]) for point in curve]
    # Compute saved: tokens after which retrieval reaches the final loss without it.
    goal = float(np.mean(final["no-retrieval"]))
    needed = [tokens_to_loss(trained["curve"], losses["retrieval"], goal) for _, trained in runs["retrieval"]]
    shares = [tokens / study.tokens for tokens in needed if tokens is not None]
    compute = f"reached with {np.mean(shares):.2f} of the tokens" if shares else "not reached"
    with_two = [study.composition(model, retrieved_documents=2)["mean"] for model, _ in runs["retrieval"]]
    without = [study.composition(model, retrieved_documents=0)["mean"] for model, _ in runs["no-retrieval"]]
    return Section(
        "(a) Retrieval at equal compute",
        "FID 10.82, 5.78, 4.88 with 0, 1, 2 retrieved documents (7B); retrieval-augmented training needs several times less compute.",
        f"Two retrieved documents lower the loss of the query: {every_seed_lower(final['retrieval'], final['no-retrieval'])}; the final "
        f"loss without retrieval is {compute}. Images are better with two documents than without retrieval: "
        f"{every_seed_higher(with_two, without)}.",
        table,
        ("million tokens", "validation loss of the query"),
        curves,
        logarithmic="y",
    )


def guidance(study: Study) -> Section:
    """(b) The guidance scale at three model sizes."""
    table, curves = [["size", *[f"guidance {scale:g}" for scale in SCALES], "best"]], {}
    best: dict[str, float] = {}
    as_good: list[set[float]] = []  # for each size the scales whose interval overlaps that of the best
    for size, changes in SIZES.items():
        model, _ = _of_size(study, size, changes, 0)
        found = [study.composition(model, 4, guidance=scale) for scale in SCALES]
        highest = max(found, key=lambda result: result["mean"])
        best[size] = SCALES[found.index(highest)]
        as_good.append({scale for scale, r in zip(SCALES, found, strict=True) if r["interval"][1] >= highest["interval"][0]})
        table.append([size, *map(with_interval, found), f"{best[size]:g}"])
        curves[size] = [(scale, r["mean"], *r["interval"]) for scale, r in zip(SCALES, found, strict=True)]
    common = sorted(set.intersection(*as_good))
    if len(common) == 1:
        verdict = HOLDS
    elif common:
        verdict = f"{UNDECIDED}, as at {', '.join(f'{scale:g}' for scale in common)} the intervals overlap that of the best"
    else:
        verdict = FAILS
    scales = ", ".join(f"{size} {scale:g}" for size, scale in best.items())
    return Section(
        "(b) Guidance scale and model size",
        "One guidance scale was used for all sizes.",
        f"One scale is as good as the best for all sizes: {verdict} (best: {scales}).",
        table,
        ("guidance scale", "composition of one image"),
        curves,
    )


def candidates(study: Study) -> Section:
    """(c) Sampling methods as the number of candidates grows, the best chosen by CLIP score."""
    model = paths.FINETUNED
    table, curves = [["sampling", *[f"{count} {'candidate' if count == 1 else 'candidates'}" for count in COUNTS]]], {}
    correct: dict[str, list[list[float]]] = {}
    for name, settings in SAMPLINGS.items():
        compute = functools.partial(correct_by_candidates, study, model, COUNTS, settings)
        correct[name] = study.cached("candidates", [name, settings, content_hash(model)], compute)
        scores: list[dict[str, Any]] = []
        for found in correct[name]:
            scores.append({"mean": float(np.mean(found)), "interval": bootstrap(found, RESAMPLES, 0)})
        table.append([name, *map(with_interval, scores)])
        curves[name] = [(count, score["mean"], *score["interval"]) for count, score in zip(COUNTS, scores, strict=True)]
    mixture, single = (
        max((name for name in correct if name.startswith("half") == mixed), key=lambda name: np.mean(correct[name][-1]))
        for mixed in (True, False)
    )
    before, most = COUNTS[-3], COUNTS[-1]
    gains = ", ".join(f"{name} {np.mean(found[-1]) - np.mean(found[-3]):+.3f}" for name, found in correct.items())
    return Section(
        "(c) More candidates",
        "Top-p and CD-K alone stagnate as candidates grow; half of each keeps improving.",
        f"With {most} candidates the better mixture ({mixture}) beats the best single method ({single}): "
        f"{paired_difference(correct[mixture][-1], correct[single][-1])}. The mixture still improves from {before} to {most} candidates: "
        f"{paired_difference(correct[mixture][-1], correct[mixture][-3])}. Gains from {before} to {most}: {gains}. With k 4 every token is "
        f"plausible that is at least {DecodingConfig().contrastive_alpha:g} times as likely as the fourth most likely one: where the model "
        "is certain, nearly all tokens are.",
        table,
        ("candidates, the best by CLIP", "composition"),
        curves,
        logarithmic="x",
    )


def masking(study: Study) -> Section:
    """(d) Masks across breaks, and how often a whole segment is masked."""
    columns = ("loss of plain documents", "composition", "CIDEr by infilling", "composition at guidance 2")
    table = [["masks (share of whole segments)", "seed", *columns]]
    accuracy: dict[str, list[float]] = {name: [] for name in MASKS}
    cider: dict[str, list[float]] = {name: [] for name in MASKS}
    for name, changes in MASKS.items():
        for seed in range(min(2, study.seeds)):
            model, trained = study.trained(f"masks-{name.split(' (')[0].replace(' ', '-')}", (*NO_RETRIEVAL, *changes), seed)
            plain, guided = study.composition(model, 2), study.composition(model, 2, guidance=2.0)
            accuracy[name].append(plain["mean"])
            cider[name].append(study.cached("cider", [content_hash(model)], functools.partial(infilling_cider, study, model)))
            loss = f"{trained['curve'][-1]['val_alone_loss']:.3f}"
            table.append([name, str(seed), loss, with_interval(plain), f"{cider[name][-1]:.2f}", with_interval(guided)])
    within = every_seed_higher(accuracy["within segments (0.15)"], accuracy["across breaks (0.15)"])
    whole = every_seed_higher(cider["whole segments in half"], cider["whole segments never"])
    cost = every_seed_higher(accuracy["whole segments never"], accuracy["whole segments in half"])
    return Section(
        "(d) Positions of masks",
        "Masks do not cross breaks, which keeps the model from generating images around text; no measurement is given.",
        f"Masks within segments give better images than masks across breaks: {within}. Masking a whole segment in half of the samples, "
        f"rather than never, gives better captions by infilling: {whole}; and costs composition accuracy: {cost}.",
        table,
    )


def tuning(study: Study) -> Section:
    """(e) Before and after instruction tuning, on every task."""
    decoding = study.config.decoding.model_dump(mode="json")
    before, after = (
        study.cached("tasks", [name, content_hash(model), decoding], functools.partial(task_scores, study, model))
        for name, model in (("pretrained", paths.PRETRAINED), ("tuned", paths.FINETUNED))
    )
    names = [name for name in after if name in before]
    table = [["score", "pretrained", "tuned"], *[[name, with_interval(before[name]), with_interval(after[name])] for name in names]]
    higher = [name for name in names if after[name]["interval"][0] > before[name]["interval"][1]]
    lower = [name for name in names if after[name]["interval"][1] < before[name]["interval"][0]]
    overlapping = sorted(set(names) - set(higher) - set(lower))
    return Section(
        "(e) Instruction tuning",
        "Tuning brings image and text tasks that pretraining alone does not.",
        f"After tuning {len(higher)} of {len(names)} scores are higher, with intervals that do not overlap. "
        f"Lower: {', '.join(lower) or 'none'}. Overlapping intervals: {', '.join(overlapping) or 'none'}.",
        table,
    )


def sizes(study: Study) -> Section:
    """(f) Three model sizes, on the same number of tokens."""
    table = [["size", "parameters", "seed", "loss", "composition of one image"]]
    losses: dict[str, list[float]] = {size: [] for size in SIZES}
    curves = {}
    for size, changes in SIZES.items():
        for seed in range(min(2, study.seeds)):
            model, trained = _of_size(study, size, changes, seed)
            loss = trained["curve"][-1]["val_alone_loss"]
            losses[size].append(loss)
            table.append([size, f"{trained['parameters']:,}", str(seed), f"{loss:.3f}", with_interval(study.composition(model, 4))])
            curves[f"{size}, seed {seed}"] = [_point(point, "val_alone_loss") for point in trained["curve"]]
    return Section(
        "(f) Model size",
        "Loss and FID fall with size (350M, 760M, 7B) and tokens.",
        f"After the same number of tokens a larger model has a lower loss: {every_seed_lower(losses['large'], losses['small'])}.",
        table,
        ("million tokens", "validation loss"),
        curves,
        logarithmic="y",
    )


def _of_size(study: Study, size: str, changes: tuple[str, ...], seed: int) -> tuple[Path, dict[str, Any]]:
    """A decoder of a size, trained with retrieval; the medium one is that of claim (a)."""
    return study.trained("retrieval" if size == "medium" else f"size-{size}", (*RETRIEVAL, *changes), seed)


def _point(point: dict[str, float], loss: str) -> tuple[float, float, float, float]:
    """A point of a learning curve, which has no interval: million tokens, loss."""
    return point["tokens"] / 1e6, point[loss], point[loss], point[loss]
