"""The champion measured again, on a schedule: a score that left its interval ends the run as failed, with an event for automations."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from cm3leon.services.environment import use_environment

use_environment()

from prefect import flow, get_run_logger  # noqa: E402
from prefect.artifacts import create_markdown_artifact  # noqa: E402
from prefect.client.schemas.objects import State  # noqa: E402
from prefect.events import emit_event  # noqa: E402
from prefect.runtime import flow_run  # noqa: E402
from prefect.states import Completed, Failed  # noqa: E402

from cm3leon.registry.registry import MODEL_NAME  # noqa: E402
from cm3leon.tracking.runs import FLOW_RUN_ENV  # noqa: E402
from flows.notify import tell_failure  # noqa: E402
from flows.session import alone, dated  # noqa: E402

LEFT_EVENT = "cm3leon.champion.score-left-interval"


@flow(
    name="cm3leon-champion",
    flow_run_name=lambda: dated("champion"),
    persist_result=False,
    on_failure=[tell_failure],
    on_crashed=[tell_failure],
)
def evaluate_champion() -> State:
    """Measure the champion again with the settings of its record; Failed, named ScoreLeftInterval, if a score left its interval."""
    return alone(_evaluate)


def _evaluate() -> State:
    from cm3leon.config.loading import load_config
    from cm3leon.registry.recheck import recheck_champion

    os.environ[FLOW_RUN_ENV] = str(flow_run.id)
    with tempfile.TemporaryDirectory() as folder:
        found = recheck_champion(load_config(), Path(folder))
    create_markdown_artifact(found.to_markdown(), key="champion-report", description="Scores of the champion, recorded and now")
    if not found.left:
        return Completed(message=f"version {found.version}: all {len(found.checks)} scores are in their intervals")
    message = f"version {found.version} left its intervals: {', '.join(map(str, found.left))}"
    get_run_logger().error(message)
    payload = {"version": found.version.number, "scores": {check.score: check.now for check in found.left}, "message": message}
    emit_event(LEFT_EVENT, {"prefect.resource.id": f"cm3leon.model.{MODEL_NAME}.{found.version}"}, payload=payload)
    return Failed(name="ScoreLeftInterval", message=message)
