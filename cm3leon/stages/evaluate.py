"""Stage ``evaluate``: measure the finished model on the test split under a written contract."""

from __future__ import annotations

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.evaluation.record import FILE as RECORD
from cm3leon.evaluation.run import CONFUSIONS, evaluate, headline
from cm3leon.tracking import runs
from cm3leon.utils.world import world

CALIBRATION = "z_calibration"
"""Where calibrations are in MLflow, which sorts by name: after the scores, and after every stage."""


def run(config: Config) -> dict[str, float]:
    """Write ``models/evaluation/record.json``, sheets of images and the table of confusions, and log the scores.

    Returns:
        The main scores and their calibrations, as metrics; nothing of a process other than the first.
    """
    with world() as processes, runs.stage_run("evaluate", config) as run:
        record = evaluate(config, paths.EVALUATION, processes=processes)
        if processes.rank > 0:
            return {}
        run.log_metrics({f"eval/{name}": score for name, score in record.scores.items()})
        run.log_metrics({f"{CALIBRATION}/{name}": score for name, score in record.calibration.items()})
        for sheet in sorted(paths.EVALUATION.glob("*.png")):
            run.log_image(sheet, sheet.stem)
        for table in (CONFUSIONS, RECORD):
            if (paths.EVALUATION / table).is_file():
                run.log_artifact(paths.EVALUATION / table)
    return headline(record)
