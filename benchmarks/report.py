"""Results of the last pipeline run, as the README and docs/log.md quote them: python benchmarks/report.py

Scores with their calibrations from ``models/evaluation/record.json``; seconds and peak memory of each stage from MLflow.
"""

from __future__ import annotations

from pathlib import Path

from cm3leon.config import paths
from cm3leon.evaluation.record import Record
from cm3leon.tracking.store import EXPERIMENT, tracking_uri

CALIBRATIONS = {
    "composition": ("composition_reconstructions", "composition_other_captions"),
    "vqa_accuracy": ("vqa_accuracy_majority", "vqa_accuracy_other_images"),
    "cider": ("cider_other_images",),
    "clip_score": ("clip_score_real", "clip_score_other_captions"),
    "fd_encoder": ("fd_encoder_reconstructions",),
}
"""Score -> its ceilings and baselines."""
PREFIX = "pipeline/"
"""Prefix of the metrics of a pipeline run."""


def scores(record: Record) -> str:
    """A Markdown table of the main scores with intervals and calibrations, then of their breakdowns."""
    lines = ["| score | | 95 % interval | calibrations |", "|---|---|---|---|"]
    for name, calibrations in CALIBRATIONS.items():
        if name not in record.scores:
            continue
        interval = record.intervals.get(name)
        shown = f"{interval[0]:.3f}–{interval[1]:.3f}" if interval else ""
        labels = {key: key.removeprefix(f"{name}_").replace("_", " ") for key in calibrations}
        known = ", ".join(f"{label} {record.calibration[key]:.3f}" for key, label in labels.items())
        lines.append(f"| {name} | **{record.scores[name]:.3f}** | {shown} | {known} |")
    lines += [f"| {name} | {score:.3f} | | |" for name, score in sorted(record.scores.items()) if "/" in name]
    return "\n".join(lines)


def stages() -> str:
    """A Markdown table of seconds and peak memory of the stages that ran, not those that were skipped, in the last pipeline run."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(Path(".")))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return "no pipeline run in the tracking store"
    for run in client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"]):
        metrics = run.data.metrics
        seconds = {key.removeprefix(PREFIX).removesuffix("_seconds"): metrics[key] for key in metrics if key.endswith("_seconds")}
        if seconds and any(key.startswith(PREFIX) for key in metrics):  # others are runs of single stages
            lines = ["| stage | seconds | peak, MiB |", "|---|---|---|"]
            for stage, took in seconds.items():
                lines.append(f"| {stage} | {took:.0f} | {metrics.get(f'{PREFIX}{stage}_peak_megabytes', 0):.0f} |")
            return "\n".join([*lines, f"| total | {sum(seconds.values()):.0f} | |"])
    return "no pipeline run in the tracking store"


if __name__ == "__main__":
    print(scores(Record.read(paths.EVALUATION)), stages(), sep="\n\n")
