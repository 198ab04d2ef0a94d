"""The whole pipeline as a Prefect flow: every stage of DVC's graph in order, then register, gate and promote.

    python -m flows.pipeline [--profile tiny] [--no-promote]

Without a Prefect server (PREFECT_API_URL, or that of ``cm3leon ui``) Prefect starts a temporary one.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from typing import cast

from cm3leon.services.environment import check_server, prepare_project, use_environment
from cm3leon.services.exclusive import alone_in_directory, check_alone

use_environment()

from prefect import flow, get_run_logger  # noqa: E402
from prefect.client.schemas.objects import State  # noqa: E402
from prefect.runtime import flow_run  # noqa: E402
from prefect.states import Completed, Failed  # noqa: E402

from cm3leon.config.schema import Config  # noqa: E402
from flows.graph import Stage, downstream_of, stage_order  # noqa: E402
from flows.promotion import register_gate_promote  # noqa: E402
from flows.report import markdown, show_table  # noqa: E402
from flows.stage import StageResult, stage_task  # noqa: E402


def run_stages(stages: list[Stage]) -> list[StageResult]:
    """Run stages in order until one fails; returns a result for each stage, with state NotRun for those after the failed one."""
    results: list[StageResult] = []
    for stage in stages:
        state = stage_task(stage.name, return_state=True)
        if state.is_completed():
            results.append(cast(StageResult, state.result()))
            continue
        error = str(state.message or "").removeprefix("Task run encountered an exception ")
        downstream = ", ".join(downstream_of(stages, stage.name)) or "none"
        get_run_logger().error("%s failed; stages that depend on it: %s", stage.name, downstream)
        results.append(StageResult(stage.name, "Failed", error=error or "a stage failed"))
        break
    return results + [StageResult(stage.name) for stage in stages[len(results) :]]


class PipelineFailedError(RuntimeError):
    """Raised once everything is recorded, so that the MLflow run of the pipeline ends as FAILED."""


def try_promotion(config: Config) -> tuple[str, str]:
    """Register, gate and promote; returns the verdict, and the error if there was one, else an empty text."""
    try:
        return register_gate_promote(config), ""
    except Exception as error:
        get_run_logger().exception("all stages are completed, but the model was not registered and gated")
        problem = f"{type(error).__name__}: {error}"
        return f"failed after the stages, {problem}; their outputs are kept: run cm3leon register, gate and promote", problem


@flow(name="cm3leon", persist_result=False)
def pipeline(profile: str | None = None, promote: bool = True) -> State:
    """Bring every stage up to date, then register the model and let the gate decide whether it becomes the champion.

    Args:
        profile: write ``params.yaml`` from ``configs/PROFILE.yaml`` first; None takes ``params.yaml`` as it is.
        promote: register, gate and promote after the stages.
    """
    with alone_in_directory():
        return run_pipeline(profile, promote)


def run_pipeline(profile: str | None, promote: bool) -> State:
    """The steps of :func:`pipeline`, in a working directory that no other run uses."""
    from cm3leon.config.loading import load_config
    from cm3leon.config.profiles import configure
    from cm3leon.tracking import runs

    if profile:
        configure(profile)
    prepare_project()
    config = load_config()
    os.environ[runs.FLOW_RUN_ENV] = str(flow_run.id)
    with suppress(PipelineFailedError), runs.pipeline_run(config) as run:
        # 1. The stages.
        results = run_stages(stage_order())
        run.log_metrics({f"pipeline/{r.stage}_seconds": r.seconds for r in results if r.state == "Completed"})
        run.log_metrics({f"pipeline/{r.stage}_peak_megabytes": r.peak_megabytes for r in results if r.peak_megabytes})
        problem = next((r.error for r in results if r.error), "")

        # 2. The registry.
        if problem:
            verdict = "failed; completed stages are kept, and the next run resumes at the failed one"
        elif promote:
            verdict, problem = try_promotion(config)
        else:
            verdict = "stages are up to date; no model registered (--no-promote)"

        # 3. The report, also of a run that failed.
        _publish(markdown(results, verdict, run.run_id))
        if problem:
            raise PipelineFailedError(problem)
    show_table(results, verdict)
    if problem:
        return Failed(message=problem)
    return Completed(message=verdict, data=[vars(result) for result in results])


def _publish(report: str) -> None:
    """Publish the report as an artifact of the flow run."""
    from prefect.artifacts import create_markdown_artifact

    create_markdown_artifact(report, key="cm3leon-pipeline", description="Stages, verdict and links of a pipeline run")


def main(arguments: list[str] | None = None) -> int:
    """Run the flow in this process; returns the exit status."""
    from dvc.exceptions import DvcException

    from cm3leon.config.profiles import configure, profile_names
    from cm3leon.utils.errors import message_to_user

    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description="Run the whole pipeline.")
    parser.add_argument("--profile", help=f"write params.yaml from configs/PROFILE.yaml first ({', '.join(profile_names())})")
    parser.add_argument("--no-promote", action="store_true", help="stop after the stages")
    options = parser.parse_args(arguments)
    try:
        check_alone()
        if options.profile:
            configure(options.profile)
        # Before DVC is asked for the graph, because outside of a git repository it needs a setting. Promotion needs the store.
        prepare_project(needs_store=not options.no_promote)
        stage_order()
        check_server()
    except Exception as error:
        message = str(error) if isinstance(error, DvcException) else message_to_user(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    state = pipeline(promote=not options.no_promote, return_state=True)
    return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(main())
