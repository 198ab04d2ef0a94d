"""The whole pipeline as a Prefect flow: every stage of DVC's graph in order, then register, gate and promote.

    python -m flows.pipeline [--profile tiny] [--no-promote] [--accept-drift]

Without a Prefect server (PREFECT_API_URL, or that of ``cm3leon ui``) the run has one of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from cm3leon.services.environment import check_server, prepare_project, use_environment

use_environment()

from prefect import flow, get_run_logger, tags  # noqa: E402
from prefect.client.schemas.objects import State  # noqa: E402
from prefect.runtime import flow_run  # noqa: E402
from prefect.states import Completed, Failed  # noqa: E402

from cm3leon.config import paths  # noqa: E402
from cm3leon.config.schema import Config  # noqa: E402
from cm3leon.services import worktree  # noqa: E402
from cm3leon.services.exclusive import alone_in_directory  # noqa: E402
from cm3leon.services.leftovers import FLOW_RUNS, end_leftover_processes, owned  # noqa: E402
from cm3leon.tracking.runs import Run  # noqa: E402
from cm3leon.utils.errors import UserError  # noqa: E402
from flows.approval import DECISION_HOURS, Hours, check_can_wait, with_decision  # noqa: E402
from flows.drift import DRIFT, drift_task, with_drift_check  # noqa: E402
from flows.graph import Stage, downstream_of, from_stage, missing_parameters, stage_order, stale_stages  # noqa: E402
from flows.notify import tell_failure  # noqa: E402
from flows.promotion import register_gate_promote  # noqa: E402
from flows.report import Before, markdown, show_table  # noqa: E402
from flows.session import dated, prefect_api, until_interrupted  # noqa: E402
from flows.stage import StageResult, stage_task  # noqa: E402


def run_stages(stages: list[Stage], check: Callable[..., State]) -> tuple[list[StageResult], list[State]]:
    """Run stages in order. Those that depend on a failed one end as NotRun, the others go on.

    Args:
        stages: as :func:`~flows.drift.with_drift_check` returns them.
        check: the task of the drift check.

    Returns:
        a result for each stage, and the states of the completed stages on which no other depends.
    """
    results: list[StageResult] = []
    completed: dict[str, State] = {}
    for stage in stages:
        if not completed.keys() >= set(stage.needs):
            results.append(StageResult(stage.name))
            continue
        run_task = check if stage.name == DRIFT else partial(stage_task, stage.name)
        state = run_task(wait_for=[completed[name] for name in stage.needs], return_state=True)
        found = state.result(raise_on_failure=False)
        # Anything but a list: the task itself failed, and not the stage's command.
        results += found if isinstance(found, list) else [StageResult(stage.name, "Failed", error=str(state.message))]
        if state.is_completed():
            completed[stage.name] = state
        else:
            downstream = ", ".join(downstream_of(stages, stage.name)) or "none"
            get_run_logger().error("%s failed; stages that depend on it: %s", stage.name, downstream)
    needed = {name for stage in stages for name in stage.needs}
    return results, [state for name, state in completed.items() if name not in needed]


EXPERIMENT_TAG = "dvc_experiment"
"""Tag of the MLflow run of the pipeline: where its outputs are, if it worked in the deployments' worktree."""


class PipelineFailedError(RuntimeError):
    """Raised once everything is recorded, so that the MLflow run of the pipeline ends as FAILED."""


def try_promotion(config: Config, after: list[State], approval: bool) -> tuple[str, str]:
    """Register, gate and promote, or propose; returns the verdict, and the error if there was one, else an empty text."""
    try:
        return register_gate_promote(config, after, approval), ""
    except Exception as error:
        get_run_logger().exception("all stages are completed, but the model was not registered and gated")
        problem = f"{type(error).__name__}: {error}"
        return f"failed after the stages, {problem}; their outputs are kept: run cm3leon register, gate and promote", problem


def run_name() -> str:
    """The flow run's name: profile and date, as "small 2026-05-31 02:00"."""
    from cm3leon.config.loading import load_config

    profile = flow_run.parameters.get("profile")
    with suppress(UserError):  # the run itself reports it
        profile = profile or load_config().profile
    return dated(profile or "pipeline")


@flow(name="cm3leon", flow_run_name=run_name, persist_result=False, on_failure=[tell_failure], on_crashed=[tell_failure])
def pipeline(
    profile: str | None = None,
    promote: bool = True,
    approval: bool = False,
    first_stage: str | None = None,
    decision_hours: Hours = DECISION_HOURS,
    accept_drift: bool = False,
) -> State:
    """Bring stages up to date, then register the model and let the gate, or a person, decide whether it becomes the champion.

    Args:
        profile: write ``params.yaml`` from ``configs/PROFILE.yaml`` first; None takes ``params.yaml`` as it is.
        promote: register, gate and promote after the stages.
        approval: let a person decide, also on a model that the gate holds back; for runs of deployments.
        first_stage: run this stage and those that depend on it; the others must be up to date. None runs all.
        decision_hours: how long the run waits for the decision; then it ends as failed, and nothing is promoted.
        accept_drift: train also on data that is further from the champion's than the section ``drift`` of the parameters allows.
    """

    def work() -> State:
        check_can_wait(approval)
        return run_pipeline(*prepare(profile, first_stage, promote), promote, approval, accept_drift)

    return with_decision(work, approval, decision_hours)


def prepare(profile: str | None, first_stage: str | None, promote: bool) -> tuple[Config, list[Stage]]:
    """The parameters and the stages to run; ``params.yaml`` is written only if the profile is valid.

    Raises:
        UserError: for an unknown profile or stage, an invalid or incomplete ``params.yaml``, stages before ``first_stage`` that are
            out of date, a disk that is too small, or an MLflow store that promotion needs and that cannot be used.
    """
    from cm3leon.config.loading import load_config
    from cm3leon.config.profiles import configure
    from cm3leon.services.disk import check_disk
    from cm3leon.tracking.store import StoreError

    if profile and first_stage:
        raise UserError("profile and first_stage exclude each other: with another profile, earlier stages are out of date")
    if profile:
        configure(profile)
    try:
        prepare_project(needs_store=promote)
    except StoreError as error:
        raise UserError(str(error)) from None
    check_inputs(load_config())
    stages = stage_order()
    if missing := missing_parameters():
        raise UserError(f"params.yaml lacks {', '.join(missing)}, which dvc.yaml names; write a complete file with: cm3leon configure NAME")
    chosen = from_stage(stages, first_stage) if first_stage else stages
    stale = stale_stages(stages)
    get_run_logger().info(check_disk(load_config(), [stage.name for stage in chosen if stage.name in stale]))
    return load_config(), chosen


def check_inputs(config: Config) -> None:
    """Raises :class:`UserError` if files that the parameters name are not there, or the FID network cannot be downloaded."""
    from cm3leon.config.files import check_files
    from cm3leon.config.schema import DOWNLOAD

    check_files(config)
    if config.evaluate.inception == DOWNLOAD:
        from cm3leon.evaluation.inception import fetch_weights

        try:
            fetch_weights()
        except (OSError, RuntimeError) as error:
            raise UserError(f"evaluate.inception {DOWNLOAD}: {error}; set the path of the weights, or null for no FID") from None


def run_pipeline(config: Config, stages: list[Stage], promote: bool, approval: bool, accept_drift: bool) -> State:
    """Run the stages, then register, gate and promote or propose; publish the report, also of a run that failed."""
    from cm3leon.tracking import overview, runs

    os.environ[runs.FLOW_RUN_ENV] = str(flow_run.id)
    with owned(FLOW_RUNS, str(flow_run.id)), suppress(PipelineFailedError), runs.pipeline_run(config) as run:
        overview.begin(run, config)
        # 1. The stages.
        results, after = run_stages(with_drift_check(stages), partial(drift_task, config, run, accept_drift))
        problem = next((r.error for r in results if r.error), "")

        # 2. The registry.
        if problem:
            verdict = "failed; completed stages are kept, and the next run resumes at the failed one"
        elif promote:
            verdict, problem = try_promotion(config, after, approval)
        else:
            verdict = "stages are up to date; no model registered (--no-promote)"

        # 3. The report, also of a run that failed.
        saved = save_results() if has_changed(results) else ""
        run.set_tags({EXPERIMENT_TAG: saved} if saved else {})
        evaluated = not any(r.error for r in results)
        overview.finish(run, verdict, evaluated)
        before = what_was_before(config, run, evaluated)
        run.log_metrics({"pipeline/seconds": sum(r.seconds for r in results)})
        run.log_metrics({f"pipeline/{r.stage}_seconds": r.seconds for r in results if r.state == "Completed"})
        run.log_metrics({f"pipeline/{r.stage}_peak_megabytes": r.peak_megabytes for r in results if r.peak_megabytes})
        _publish(markdown(results, verdict, run, before, saved), config.profile)
        if problem:
            raise PipelineFailedError(problem)
    show_table(results, verdict, run, before)
    if problem:
        return Failed(message=problem)
    return Completed(message=verdict, data=[vars(result) for result in results])


def has_changed(results: list[StageResult]) -> bool:
    """Whether a stage has new outputs; the drift check has none."""
    return any(result.state in ("Completed", "Cached") for result in results if result.stage != DRIFT)


def what_was_before(config: Config, run: Run, evaluated: bool) -> Before:
    """How long stages took in earlier runs, and the fresh runs of the same parameters.

    Args:
        evaluated: the evaluation in ``models/`` is that of this run.
    """
    from cm3leon.evaluation.reference import Comparison, compare
    from cm3leon.tracking.durations import last_seconds

    try:
        reference = compare(config, paths.EVALUATION if evaluated else None)
    except UserError as error:
        get_run_logger().warning("the scores are not compared with those of fresh runs: %s", error)
        reference = Comparison()
    return Before(last_seconds(run, config.profile), reference)


def save_results() -> str:
    """Save what a run of a deployment has changed as an experiment of DVC; returns its name, "" for a run in the project itself."""
    if worktree.project_of(Path.cwd()) is None:
        return ""
    try:
        return worktree.save_results(f"{flow_run.name} {flow_run.id[:8]}")
    except UserError as error:
        get_run_logger().warning("the outputs are in DVC's cache, but were not saved as an experiment: %s", error)
        return ""


def _publish(report: str, profile: str) -> None:
    """Publish the report as an artifact of the flow run."""
    from prefect.artifacts import create_markdown_artifact

    create_markdown_artifact(report, key="pipeline-report", description=f"Profile {profile}: verdict, scores, stages")


def main(arguments: list[str] | None = None) -> int:
    """Run the flow in this process; returns the exit status."""
    from dvc.exceptions import DvcException

    from cm3leon.config.loading import load_config
    from cm3leon.config.profiles import configure, profile_names
    from cm3leon.services.disk import check_disk
    from cm3leon.utils.errors import message_to_user

    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description="Run the whole pipeline.")
    parser.add_argument("--profile", help=f"write params.yaml from configs/PROFILE.yaml first ({', '.join(profile_names())})")
    parser.add_argument("--no-promote", action="store_true", help="stop after the stages")
    parser.add_argument("--accept-drift", action="store_true", help="train also on data that is far from the champion's")
    options = parser.parse_args(arguments)
    try:
        with alone_in_directory():
            end_leftover_processes()  # a command of a killed run would hold DVC's lock
            if options.profile:
                configure(options.profile)
            # Before DVC is asked for the graph, because outside of a git repository it needs a setting. Promotion needs the store.
            prepare_project(needs_store=not options.no_promote)
            check_inputs(load_config())
            stages = stage_order()
        check_server()
        check_disk(load_config(), stale_stages(stages))  # the run itself says so, but this before there is one
        with prefect_api(), tags("cm3leon", load_config().profile):
            state = pipeline(promote=not options.no_promote, accept_drift=options.accept_drift, return_state=True)
    except Exception as error:
        message = str(error) if isinstance(error, DvcException) else message_to_user(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(until_interrupted(main))
