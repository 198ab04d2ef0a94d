"""The claims of the paper: the paper's result, the measurement here, and a verdict."""

from __future__ import annotations

import functools
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
            scores = [with_interval(study.composition(model, retrieved_documents=count)) for count in (0, 1, 2)]
            losses = [f"{trained['curve'][-1][f'val_{key}_loss']:.3f}" for key in ("alone", "retrieved")]
            table.append([name, str(seed), *losses, *scores])

    # 2. Final losses, each with the documents that the decoder was trained on, and the tokens to the same loss.
    final = {
        name: [t["curve"][-1][key] for _, t in runs[name]]
        for name, key in (("retrieval", "val_retrieved_loss"), ("no-retrieval", "val_alone_loss"))
    }
    goal = float(np.mean(final["no-retrieval"]))
    needed = [tokens_to_loss(t["curve"], "val_retrieved_loss", goal) for _, t in runs["retrieval"]]
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
    lower = every_seed_lower(final["retrieval"], final["no-retrieval"])
    return Section(
        "(a) Retrieval at equal compute",
        "FID 10.82, 5.78, 4.88 with 0, 1, 2 retrieved documents (7B); retrieval-augmented training needs several times less compute.",
        f"The loss is lower with two retrieved documents than without retrieval: {lower}; {compute}. Composition is higher with two "
        f"retrieved documents than without retrieval: {every_seed_higher(documents, none)}.",
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
        table.append([size, *map(with_interval, found), f"{best[size]:g}"])
        curves[size] = [(scale, r["mean"], *r["interval"]) for scale, r in zip(SCALES, found, strict=True)]
    common = sorted(set.intersection(*as_good))
    if len(common) == 1:
        same = HOLDS
    elif common:
        overlapping = ", ".join(f"{scale:g}" for scale in common)
        same = f"{UNDECIDED} (at {overlapping} the intervals overlap that of the best)"
    else:
        same = FAILS
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
        compute = functools.partial(correct_by_candidates, study, model, COUNTS, settings)
        found = study.kept("candidates", [name, settings, content_hash(model)], compute)
        shown: list[dict[str, Any]] = [{"mean": float(np.mean(values)), "interval": bootstrap(values, RESAMPLES, 0)} for values in found]
        table.append([name, *map(with_interval, shown)])
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
        f"{paired_difference(right[mixture][-1], right[other][-1])}. It still improves from {COUNTS[-3]} to {COUNTS[-1]} candidates: "
        f"{paired_difference(right[mixture][-1], right[mixture][-3])}; gains of all: {gains}. With k 4, CD-K keeps every token that is at "
        f"least {DecodingConfig().contrastive_alpha:g} times as likely as the fourth most likely one, so nearly all if the model "
        "is confident.",
        table,
        ("candidates, the best by CLIP", "composition"),
        curves,
        logarithmic="x",
    )


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
            cider = study.kept("cider", [content_hash(model)], functools.partial(infilling_cider, study, model))
            scores[name].append(plain["mean"])
            ciders[name].append(cider)
            loss = f"{trained['curve'][-1]['val_alone_loss']:.3f}"
            table.append([name, str(seed), loss, with_interval(plain), f"{cider:.2f}", with_interval(guided)])
    within = every_seed_higher(scores["within segments (0.15)"], scores["across breaks (0.15)"])
    whole = every_seed_higher(ciders["whole segments in half"], ciders["whole segments never"])
    cost = every_seed_higher(scores["whole segments never"], scores["whole segments in half"])
    return Section(
        "(d) Masks across breaks, and whole segments",
        "Masks do not cross breaks, which keeps the model from generating images around text; no score is given.",
        f"Composition is higher with masks within segments than with masks across breaks: {within}. Captions by infilling are better if "
        f"whole segments are masked in half of the samples than if they never are: {whole}; this costs composition: {cost}.",
        table,
    )


def tuning(study: Study) -> Section:
    """(e) Before and after instruction tuning, on every task."""
    decoding = study.config.decoding.model_dump(mode="json")
    found = {
        name: study.kept("tasks", [name, content_hash(model), decoding], functools.partial(task_scores, study, model))
        for name, model in (("pretrained", paths.PRETRAINED), ("tuned", paths.FINETUNED))
    }
    before, after = found["pretrained"], found["tuned"]
    names = [name for name in after if name in before]
    table = [["score", "pretrained", "tuned"], *[[name, with_interval(before[name]), with_interval(after[name])] for name in names]]
    higher = [name for name in names if after[name]["interval"][0] > before[name]["interval"][1]]
    lower = [name for name in names if after[name]["interval"][1] < before[name]["interval"][0]]
    return Section(
        "(e) Instruction tuning",
        "Instruction tuning adds image and text tasks that the pretrained model cannot do.",
        f"After tuning {len(higher)} of {len(names)} scores are higher, as intervals do not overlap. Lower: {', '.join(lower) or 'none'}. "
        f"Undecided, as intervals overlap: {', '.join(sorted(set(names) - set(higher) - set(lower))) or 'none'}.",
        table,
    )


def sizes(study: Study) -> Section:
    """(f) Loss and composition at three model sizes."""
    table = [["size", "parameters", "seed", "loss", "composition of one image"]]
    losses: dict[str, list[float]] = {}
    curves = {}
    for size, changes in SIZES.items():
        losses[size] = []
        for seed in range(min(2, study.seeds)):
            model, trained = study.trained("retrieval" if size == "medium" else f"size-{size}", (*BASE, *changes), seed)
            loss = trained["curve"][-1]["val_alone_loss"]
            losses[size].append(loss)
            table.append([size, f"{trained['parameters']:,}", str(seed), f"{loss:.3f}", with_interval(study.composition(model, 4))])
            curves[f"{size}, seed {seed}"] = [
                (p["tokens"] / 1e6, p["val_alone_loss"], *[p["val_alone_loss"]] * 2) for p in trained["curve"]
            ]
    larger = every_seed_lower(losses["large"], losses["small"])
    return Section(
        "(f) Model size",
        "Loss and FID fall with size (350M, 760M, 7B) and tokens.",
        f"A larger model has a lower loss after the same number of tokens: {larger}.",
        table,
        ("million tokens", "validation loss"),
        curves,
        logarithmic="y",
    )
