"""The claims of the paper: the paper's result, the measurement here, and a verdict."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.study.measurements import drawn_candidates, infilling_cider, task_scores
from benchmarks.study.runs import Study
from benchmarks.study.section import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Finding,
    Point,
    Section,
    difference,
    higher,
    lower,
    over_trainings,
    tokens_to_loss,
    with_interval,
    with_range,
)
from cm3leon.config import paths
from cm3leon.config.schema import DecodingConfig
from cm3leon.tracking.lineage import content_hash

BASE: tuple[str, ...] = ("pretrain.retrieved_documents=[0.2, 0.4, 0.4]",)
ALONE = ("pretrain.retrieved_documents=[1.0]",)
"""Changes to the parameters: pretraining with 0, 1 or 2 retrieved documents at these rates (BASE), or without retrieval (ALONE)."""
SIZES = {
    "small": ("pretrain.model.layers=2", "pretrain.model.width=64", "pretrain.model.heads=2"),
    "medium": (),
    "large": ("pretrain.model.layers=6", "pretrain.model.width=128", "pretrain.model.heads=4"),
}
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
TUNED = ("composition", "vqa_accuracy", "cider")
"""Scores of (e) that stand at the head of the page."""
MARGIN = 0.05
"""Composition by which a size's own best guidance scale may be better than the common one, and the common one still counts as best."""
COUNTS = (1, 2, 4, 8, 16, 32)
SAMPLINGS: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "top-p 0.9": {"top_p": 0.9},
    "CD-K": {"contrastive": 1.0, "contrastive_k": 1},
}
"""Sampling strategies. The paper does not state its k; with k = 4 and the default alpha nearly all tokens of a sure decoder would pass."""
MIXTURE = "half top-p 0.9, half CD-K"
"""Half of the candidates by each of these two."""


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
    # The loss to be reached is that of the same seed. A training that does not reach it counts as one that needs all tokens.
    pairs = zip(runs["retrieval"], final["no-retrieval"], strict=True)
    needed = [tokens_to_loss(t["curve"], "val_retrieved_loss", goal) or study.tokens for (_, t), goal in pairs]
    shares = [tokens / study.tokens for tokens in needed]
    documents = [study.composition(model, retrieved_documents=2)["mean"] for model, _ in runs["retrieval"]]
    dropped = [study.composition(model, retrieved_documents=0)["mean"] for model, _ in runs["retrieval"]]
    never = [study.composition(model, retrieved_documents=0)["mean"] for model, _ in runs["no-retrieval"]]

    # 3. Learning curves.
    curves = {
        f"{name}, seed {seed}": [(p["tokens"] / 1e6, p[key], p[key], p[key]) for p in t["curve"]]
        for name, key in (("retrieval", "val_retrieved_loss"), ("no-retrieval", "val_alone_loss"))
        for seed, (_, t) in enumerate(runs[name])
    }
    return Section(
        "(a) Retrieval at equal compute",
        "FID 10.82, 5.78, 4.88 with 0, 1, 2 retrieved documents (7B); retrieval-augmented training needs several times less compute.",
        [
            lower("the loss is lower with two retrieved documents than without retrieval", *final.values()),
            lower("the final loss without retrieval is reached with fewer tokens, as a share of them", shares, [1.0] * len(shares)),
            higher("composition is higher with two retrieved documents than without retrieval", documents, never),
            higher("a decoder trained with retrieval composes better with two documents than with none", documents, dropped),
        ],
        "Losses are those of the query, nats a token. Retrieved documents count as tokens, so that a decoder trained with them sees fewer "
        "queries.",
        table,
        ("million tokens", "validation loss of the query"),
        curves,
        logarithmic="y",
    )


def guidance(study: Study) -> Section:
    """(b) The best guidance scale at three model sizes."""
    # 1. Composition by size, scale and seed.
    table = [["size", *[f"guidance {scale:g}" for scale in SCALES], "best"]]
    curves: dict[str, list[Point]] = {}
    scores: dict[str, np.ndarray] = {}
    for size, changes in SIZES.items():
        models = [study.trained(decoder_name(size), (*BASE, *changes), seed)[0] for seed in range(study.seeds)]
        scores[size] = np.array([[study.composition(model, 2, guidance=scale)["mean"] for scale in SCALES] for model in models])
        curves[size] = over_trainings(SCALES, scores[size])
        table.append([size, *map(with_range, curves[size]), f"{SCALES[int(scores[size].mean(0).argmax())]:g}"])

    # 2. The common scale is the one that costs least where it costs most.
    lost = np.array([found.mean(0).max() - found.mean(0) for found in scores.values()])
    common = int(lost.max(0).argmin())
    size, found = list(scores.items())[int(lost[:, common].argmax())]
    gain, low, high = difference(found[:, int(found.mean(0).argmax())], found[:, common])
    verdict = HOLDS if high < MARGIN else FAILS if low > MARGIN else UNDECIDED
    return Section(
        "(b) Guidance scale and model size",
        "One guidance scale is used for all sizes.",
        [Finding(f"one guidance scale, {SCALES[common]:g}, is best for all sizes", gain, low, high, verdict)],
        f"The effect is the composition that a size gains by its own best scale over the common one, at the size where it gains most "
        f"({size}). The claim holds if that is surely below {MARGIN:g}. Cells are means and ranges over seeds.",
        table,
        ("guidance scale", "composition of one image"),
        curves,
    )


def candidates(study: Study) -> Section:
    """(c) Sampling strategies with more candidates, of which the one with the highest CLIP score counts."""
    # 1. Composition of each strategy, by run and number of candidates.
    found: dict[str, list[list[float]]] = {name: [] for name in (*SAMPLINGS, MIXTURE)}
    for run in study.runs:
        with study.at(run) as own:
            drawn = {}
            for name, settings in SAMPLINGS.items():
                compute = functools.partial(drawn_candidates, own, paths.FINETUNED, COUNTS[-1], settings)
                drawn[name] = own.kept("candidates", [settings, COUNTS[-1], content_hash(paths.FINETUNED)], compute)
        for name, of in drawn.items():
            found[name].append([best_of(of, np.arange(count)) for count in COUNTS])
        # The mixture takes turns; of CD-K the second half, whose noise is not that of top-p's first half.
        both = {key: np.concatenate([drawn["top-p 0.9"][key], drawn["CD-K"][key]], 1) for key in ("right", "clip")}
        turns = np.stack([np.arange(COUNTS[-1] // 2), np.arange(COUNTS[-1] // 2) + COUNTS[-1] * 3 // 2], 1).ravel()
        found[MIXTURE].append([best_of(both, turns[:count]) for count in COUNTS])

    # 2. The claims.
    scores = {name: np.array(values) for name, values in found.items()}
    single = max(SAMPLINGS, key=lambda name: scores[name][:, -1].mean())
    eight = COUNTS.index(8)
    grows = [
        higher(f"{name}: composition is higher with {COUNTS[-1]} candidates than with 8", of[:, -1], of[:, eight])
        for name, of in scores.items()
        if "top-p" in name or "CD-K" in name
    ]
    claim = f"with {COUNTS[-1]} candidates, {MIXTURE} is better than the best single strategy ({single})"
    better = higher(claim, scores[MIXTURE][:, -1], scores[single][:, -1])

    # 3. The table and the plot.
    table = [["sampling", *[f"{count} {'candidate' if count == 1 else 'candidates'}" for count in COUNTS]]]
    curves: dict[str, list[Point]] = {}
    for name, values in scores.items():
        curves[name] = over_trainings(COUNTS, values)
        table.append([name, *map(with_range, curves[name])])
    return Section(
        "(c) More candidates",
        "Top-p and CD-K alone stagnate as candidates grow; half of each keeps improving.",
        [*grows, better],
        f"Images of the tuned decoders of {len(study.runs)} pipeline runs, without guidance; CD-K with k 1 and alpha "
        f"{DecodingConfig().contrastive_alpha:g}. Fewer candidates are the first of the same ones. Of several the one counts that CLIP "
        "likes best, as in the paper; the project's own ranking also asks the decoder. Cells are means and ranges over runs.",
        table,
        ("candidates, the best by CLIP", "composition"),
        curves,
        logarithmic="x",
    )


def best_of(drawn: Mapping[str, Any], numbers: np.ndarray) -> float:
    """Composition if, of each prompt's candidates of these numbers, the one with the highest CLIP score counts."""
    right, clip = (np.asarray(drawn[key])[:, numbers] for key in ("right", "clip"))
    return float(np.take_along_axis(right, clip.argmax(1)[:, None], 1).mean())


def masking(study: Study) -> Section:
    """(d) Masks across breaks, and how often a whole segment is masked."""
    variants = {
        "within segments (0.15)": ("pretrain.objective.mean_masks=1.0", "pretrain.objective.segment_rate=0.15"),
        "across breaks (0.15)": (
            "pretrain.objective.mean_masks=1.0", "pretrain.objective.segment_rate=0.15", "pretrain.objective.across_breaks=true"
        ),
        "whole segments never": ("pretrain.objective.mean_masks=1.0", "pretrain.objective.segment_rate=0.0"),
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
        for seed in range(study.seeds):
            model, trained = study.trained(f"masks-{name.split(' (')[0].replace(' ', '-')}", (*ALONE, *changes), seed)
            plain, guided = study.composition(model, 2), study.composition(model, 2, guidance=2.0)
            cider = study.kept("cider", [content_hash(model)], functools.partial(infilling_cider, study, model))
            scores[name].append(plain["mean"])
            ciders[name].append(cider)
            loss = f"{trained['curve'][-1]['val_alone_loss']:.3f}"
            table.append([name, str(seed), loss, with_interval(plain), f"{cider:.2f}", with_interval(guided)])
    within, across, never = variants
    return Section(
        "(d) Masks across breaks, and whole segments",
        "Masks do not cross breaks, which keeps the model from generating images around text; no score is given.",
        [
            higher("composition is higher with masks within segments than across breaks", scores[within], scores[across]),
            higher("captions by infilling (CIDEr) are better if whole segments are sometimes masked", ciders[within], ciders[never]),
            lower("whole masked segments lower composition", scores[within], scores[never]),
        ],
        "All without retrieval, with one masked span a sample on average.",
        table,
    )


def tuning(study: Study) -> Section:
    """(e) Before and after instruction tuning, on every task."""
    scores: dict[str, list[tuple[float, float]]] = {}
    for run in study.runs:
        with study.at(run) as own:
            decoding = own.config.decoding.model_dump(mode="json")
            before, after = (
                own.kept("tasks", [name, content_hash(model), decoding], functools.partial(task_scores, own, model))
                for name, model in (("pretrained", paths.PRETRAINED), ("tuned", paths.FINETUNED))
            )
        for name in after:
            if name in before:
                scores.setdefault(name, []).append((before[name]["mean"], after[name]["mean"]))
    table, findings = [["score", "pretrained", "tuned", "effect", "95 % interval", "verdict"]], {}
    for name, pairs in scores.items():
        was, now = zip(*pairs, strict=True)
        findings[name] = higher(f"{name} is higher after tuning", now, was)
        table.append([name, f"{np.mean(was):.3f}", f"{np.mean(now):.3f}", *findings[name].cells[1:]])
    verdicts = [finding.verdict for finding in findings.values()]
    return Section(
        "(e) Instruction tuning",
        "Instruction tuning adds image and text tasks that the pretrained model cannot do.",
        [findings[name] for name in TUNED if name in findings],
        f"Of {len(verdicts)} scores {verdicts.count(HOLDS)} are higher after tuning, {verdicts.count(FAILS)} lower, and "
        f"{verdicts.count(UNDECIDED)} undecided; means over {len(study.runs)} pipeline runs.",
        table,
    )


def sizes(study: Study) -> Section:
    """(f) Loss and composition at three model sizes."""
    table = [["size", "parameters", "seed", "loss", "composition of one image"]]
    losses: dict[str, list[float]] = {}
    scores: dict[str, list[float]] = {}
    curves = {}
    for size, changes in SIZES.items():
        losses[size], scores[size] = [], []
        for seed in range(study.seeds):
            model, trained = study.trained(decoder_name(size), (*BASE, *changes), seed)
            found = study.composition(model, 4)
            losses[size].append(trained["curve"][-1]["val_alone_loss"])
            scores[size].append(found["mean"])
            table.append([size, f"{trained['parameters']:,}", str(seed), f"{losses[size][-1]:.3f}", with_interval(found)])
            curves[f"{size}, seed {seed}"] = [
                (p["tokens"] / 1e6, p["val_alone_loss"], *[p["val_alone_loss"]] * 2) for p in trained["curve"]
            ]
    return Section(
        "(f) Model size",
        "Loss and FID fall with size (350M, 760M, 7B) and tokens.",
        [
            lower("the large decoder has a lower loss than the small one", losses["large"], losses["small"]),
            higher("its composition is higher", scores["large"], scores["small"]),
        ],
        "All decoders are trained with retrieval, on as many tokens.",
        table,
        ("million tokens", "validation loss"),
        curves,
        logarithmic="y",
    )


def decoder_name(size: str) -> str:
    """The name of a decoder of a size that is trained with retrieval; the medium one is that of (a)."""
    return "retrieval" if size == "medium" else f"size-{size}"


CLAIMS: dict[str, Callable[[Study], Section]] = {
    "retrieval": retrieval,
    "guidance": guidance,
    "candidates": candidates,
    "masking": masking,
    "tuning": tuning,
    "sizes": sizes,
}


def measured(name: str, study: Study) -> Section:
    """A section of the page, in a process of its own."""
    start = time.perf_counter()
    section = CLAIMS[name](study)
    print(f"{name}: done after {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    return section
