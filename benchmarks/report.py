"""The scores and times of the last pipeline run that the README and docs/log.md quote: python benchmarks/report.py

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


def scores(record: Record) -> str:
    """A Markdown table of the main scores with their intervals and calibrations."""
    lines = ["| name | score | 95 % interval | calibration |", "|---|---|---|---|"]
    for name, others in CALIBRATIONS.items():
        if name not in record.scores:
            continue
        interval = record.intervals.get(name)
        shown = f"{interval[0]:.3f}–{interval[1]:.3f}" if interval else ""
        calibration = ", ".join(
            f"{other.removeprefix(name + '_').replace('_', ' ')} {record.calibration[other]:.3f}"
            for other in others
            if other in record.calibration
        )
        lines.append(f"| {name} | **{record.scores[name]:.3f}** | {shown} | {calibration} |")
    lines += [f"| {name} | {value:.3f} | | |" for name, value in sorted(record.scores.items()) if "/" in name]
    return "\n".join(lines)


def stages() -> str:
    """A Markdown table of seconds and peak memory of the stages that the last pipeline run executed."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(Path()))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return "no pipeline run in the tracking store"
    for run in client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"]):
        seconds = {k.removeprefix("pipeline/").removesuffix("_seconds"): v for k, v in run.data.metrics.items() if k.endswith("_seconds")}
        if seconds and any(key.startswith("pipeline/") for key in run.data.metrics):
            lines = ["| stage | seconds | peak, MB |", "|---|---|---|"]
            for stage, value in seconds.items():
                lines.append(f"| {stage} | {value:.0f} | {run.data.metrics.get(f'pipeline/{stage}_peak_megabytes', 0):.0f} |")
            return "\n".join([*lines, f"| total | {sum(seconds.values()):.0f} | |"])
    return "no pipeline run in the tracking store"


if __name__ == "__main__":
    print(scores(Record.read(paths.EVALUATION)), stages(), sep="\n\n")
