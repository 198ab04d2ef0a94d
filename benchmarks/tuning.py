"""Instruction tuning with and without the CM3 objective, and longer: python -m benchmarks.tuning [--masks 0 1] [--steps N ...]

Tunes the pretrained decoder of the last pipeline run with each ``sft.mean_masks`` and for each number of ``sft.steps``, into
``models/study/``, and prints losses and scores of every task on the val split, with 95 % intervals, and the minutes of tuning. Scores are
of one run of each setting and seed; decoders and scores are kept, so that an interrupted run goes on when it is started again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time

from benchmarks.study.measurements import infilling_cider, task_scores
from benchmarks.study.runs import ROOT, Study
from benchmarks.study.section import with_interval
from cm3leon.config import paths
from cm3leon.config.loading import load_config
from cm3leon.config.schema import SFTConfig
from cm3leon.data.tokens import TokenStore
from cm3leon.evaluation.record import digest
from cm3leon.models.decoder import Decoder
from cm3leon.tracking.lineage import content_hash
from cm3leon.training.instruction_tuning import task_samples, training_of, validation_batches
from cm3leon.training.run import make_stream
from cm3leon.training.trainer import fit, setup


def tuned_losses(study: Study, section: SFTConfig, seed: int) -> dict[str, float]:
    """Tune the pretrained decoder, unless it was before, into ``models/study/``; returns its last validation losses, and ``minutes``."""
    directory = ROOT / name_of(section, seed)

    def tune() -> dict[str, float]:
        model = Decoder.load(paths.PRETRAINED)
        samples = task_samples("train", TokenStore(paths.TOKENS, ["train"]), model, section, seed)
        held_out = task_samples("val", TokenStore(paths.TOKENS, ["val"]), model, study.config.sft, seed)
        stream = make_stream(samples, len(samples), section, seed, model.spec.context)
        start = time.perf_counter()
        metrics = fit(setup(model, section), stream, section, validation_batches(held_out, section, seed), directory.name)
        model.save(directory)
        training_of(samples.counts, section, study.config.pretrain.objective).write(directory)
        return {**metrics, "minutes": (time.perf_counter() - start) / 60}

    return study.kept(directory.name, "losses", tune)


def name_of(section: SFTConfig, seed: int) -> str:
    """The name of a tuned decoder's directory."""
    return f"tuned-{seed}-{digest([section.model_dump(mode='json'), content_hash(paths.PRETRAINED)])}"


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masks", type=float, nargs="+", default=[0.0, 1.0], help="values of sft.mean_masks")
    parser.add_argument("--steps", type=int, nargs="+", default=[load_config().sft.steps], help="values of sft.steps")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=200)
    options = parser.parse_args()
    study = Study(load_config(), 0, options.prompts, options.seeds)
    columns: dict[str, dict[str, str]] = {}
    for seed, steps, masks in itertools.product(range(options.seeds), options.steps, options.masks):
        section = study.config.sft.model_copy(update={"mean_masks": masks, "steps": steps, "validate_every": steps})
        losses = tuned_losses(study, section, seed)
        model = ROOT / name_of(section, seed)
        key = [str(model), study.config.decoding.model_dump(mode="json")]
        scores = study.kept("tasks", key, functools.partial(task_scores, study, model))
        cider = study.kept("infilled", key, functools.partial(infilling_cider, study, model))
        shown = {"minutes": f"{losses['minutes']:.1f}"} | {name: f"{loss:.4f}" for name, loss in losses.items() if name.endswith("loss")}
        shown |= {name: with_interval(score) for name, score in scores.items()} | {"cider of an infilled caption": f"{cider:.2f}"}
        columns[f"mean_masks {masks:g}, {steps:,} steps, seed {seed}"] = shown
    print("| |", " | ".join(columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for name in next(iter(columns.values())):
        print(f"| {name} |", " | ".join(column[name] for column in columns.values()), "|")


if __name__ == "__main__":
    main()
