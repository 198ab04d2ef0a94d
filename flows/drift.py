"""The drift check as a task between ``validate`` and the stages that need it: past its limits they do not run."""

from __future__ import annotations

import time
from dataclasses import replace

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from cm3leon.config.schema import Config
from cm3leon.tracking.runs import Run
from flows.graph import Stage
from flows.report import mlflow_page
from flows.stage import StageResult

DRIFT, AFTER = "drift", "validate"


def with_drift_check(stages: list[Stage]) -> list[Stage]:
    """The stages with the check after :data:`AFTER`, which all need that need :data:`AFTER`; unchanged without such a stage.

    A run that starts at a later stage has no check: :func:`flows.graph.from_stage` refuses data that no run has checked, because stages
    are out of date.
    """
    checked: list[Stage] = []
    for stage in stages:
        checked.append(replace(stage, needs=(*stage.needs, DRIFT)) if AFTER in stage.needs else stage)
        if stage.name == AFTER:
            checked.append(Stage(DRIFT, (AFTER,)))
    return checked


@task(name=DRIFT, task_run_name=DRIFT, cache_policy=NO_CACHE, persist_result=False)
def drift_task(config: Config, run: Run, accept: bool) -> State:
    """Check the validated data, and publish what was found; ends Skipped if there was nothing to compare, Failed past the limits.

    Args:
        run: the MLflow run of the pipeline.
        accept: a person wants to go on past the limits.
    """
    from cm3leon.registry.drift import ACCEPT, REPORT, check_run

    start = time.monotonic()
    checked = check_run(config, run, accept)
    get_run_logger().info(checked.message)
    result = StageResult(DRIFT, "Completed" if checked.drift else "Skipped")
    if checked.drift:
        result.metrics = checked.drift.values
        link = mlflow_page(run, f"{REPORT.stem}/{REPORT.name}") or REPORT.absolute().as_uri()
        report = f"{checked.drift.to_markdown()}\n[report with plots]({link})\n"
        create_markdown_artifact(report, key="drift-report", description="The new training data compared with the champion's")
    result.seconds = time.monotonic() - start
    if checked.stopped:
        result.state, result.error = "Failed", f"{checked.message}. Nothing was trained. {ACCEPT}"
        return Failed(message=result.error, data=[result])
    return Completed(name=result.state, message=checked.message, data=[result])
