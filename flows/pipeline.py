"""The whole job as a Prefect flow: every stage of DVC's graph in order, then register, gate and promote.

    python -m flows.pipeline [--profile tiny] [--no-promote]

Without a Prefect server (PREFECT_API_URL, or that of ``cm3leon ui``) Prefect starts a temporary one.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from typing import cast

from cm3leon.services.environment import prepare_project, use_environment

use_environment()

from prefect import flow, get_run_logger  # noqa: E402
from prefect.client.schemas.objects import State  # noqa: E402
from prefect.runtime import flow_run  # noqa: E402
from prefect.states import Completed, Failed  # noqa: E402

from cm3leon.config.schema import GateConfig  # noqa: E402
from flows.graph import Stage, affected, stage_order  # noqa: E402
from flows.promotion import register_gate_promote  # noqa: E402
from flows.report import markdown, show_table  # noqa: E402
from flows.stage import Outcome, stage_task  # noqa: E402


def run_stages(stages: list[Stage], outcomes: list[Outcome]) -> bool:
    """Run stages in order until one fails; fills in ``outcomes``. Whether all ended well."""
    for stage, place in zip(stages, range(len(outcomes)), strict=True):
        state = stage_task(stage.name, return_state=True)
        if not state.is_completed():
            outcomes[place].state = "Failed"
            outcomes[place].error = str(state.message or "").removeprefix("Task run encountered an exception ")
            waiting = sorted(affected(stages, stage.name) - {stage.name})
            get_run_logger().error("%s failed; not run because of it: %s", stage.name, ", ".join(waiting) or "nothing else")
            return False
        outcomes[place] = cast(Outcome, state.result())
    return True


class PipelineFailedError(RuntimeError):
    """Ends the MLflow run of a pipeline as FAILED once everything is recorded; the message is the error's."""


def promoted(config: GateConfig) -> tuple[str, str]:
    """Register, gate and promote: the verdict, and the error that stopped it, empty where there was none."""
    try:
        return register_gate_promote(config), ""
    except Exception as error:
        get_run_logger().exception("the stages are done, but the model was not registered and gated")
        problem = f"{type(error).__name__}: {error}"
        return f"failed after the stages, {problem}; they are kept, and cm3leon register, gate and promote go on from there", problem


@flow(name="cm3leon", persist_result=False)
def pipeline(profile: str | None = None, promote: bool = True) -> State:
    """Bring every stage up to date, then register the model and let the gate decide whether it becomes the champion.

    Args:
        profile: write ``params.yaml`` from ``configs/PROFILE.yaml`` first; None takes ``params.yaml`` as it is.
        promote: register, gate and promote after the stages.
    """
    from cm3leon.config.profiles import configure
    from cm3leon.config.schema import load_config
    from cm3leon.tracking import runs

    if profile:
        configure(profile)
    prepare_project()
    config = load_config()
    os.environ[runs.FLOW_RUN_ENV] = str(flow_run.id)
    stages = stage_order()
    outcomes = [Outcome(stage.name) for stage in stages]
    problem = ""
    with suppress(PipelineFailedError), runs.pipeline_run(config) as run:
        done = run_stages(stages, outcomes)
        run.log_metrics({f"pipeline/{o.stage}_seconds": o.seconds for o in outcomes if o.state == "Completed"})
        run.log_metrics({f"pipeline/{o.stage}_peak_megabytes": o.peak_megabytes for o in outcomes if o.peak_megabytes})
        if not done:
            verdict = "failed; finished stages are kept, and the next run goes on from there"
            problem = next((outcome.error for outcome in outcomes if outcome.error), "a stage failed")
        elif promote:
            verdict, problem = promoted(config.gate)
        else:
            verdict = "stages are up to date; nothing registered (--no-promote)"
        _publish(markdown(outcomes, verdict, run.run_id))
        if problem:
            raise PipelineFailedError(problem)
    show_table(outcomes, verdict)
    if problem:
        return Failed(message=problem)
    return Completed(message=verdict, data=[vars(o) for o in outcomes])


def _publish(report: str) -> None:
    """The report as an artifact of the run."""
    from prefect.artifacts import create_markdown_artifact

    create_markdown_artifact(report, key="cm3leon-pipeline", description="Stages, verdict and links of a pipeline run")


def main(arguments: list[str] | None = None) -> int:
    """Run the flow in this process; returns the exit status."""
    from dvc.exceptions import DvcException

    from cm3leon.config.profiles import configure, profile_names
    from cm3leon.config.schema import ConfigError, load_config

    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description="Run the whole pipeline.")
    parser.add_argument("--profile", help=f"write params.yaml from configs/PROFILE.yaml first ({', '.join(profile_names())})")
    parser.add_argument("--no-promote", action="store_true", help="stop after the stages")
    options = parser.parse_args(arguments)
    try:
        if options.profile:
            configure(options.profile)
        load_config()
        stage_order()
    except (ConfigError, DvcException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    state = pipeline(promote=not options.no_promote, return_state=True)
    return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(main())
