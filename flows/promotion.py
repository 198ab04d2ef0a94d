"""Register, gate, promote and roll back: they change the registry, so they are tasks of the flow and not stages of the graph.

python -m flows.promotion              # register, gate and promote the stages' outputs
python -m flows.promotion --rollback   # make the previous champion the champion again
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import cast

from cm3leon.services.environment import check_server, use_environment

use_environment()

from prefect import flow, get_run_logger, task  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.client.schemas.objects import State  # noqa: E402
from prefect.runtime import flow_run  # noqa: E402
from prefect.states import Completed  # noqa: E402

from cm3leon.config.schema import Config  # noqa: E402
from cm3leon.registry.gate import Verdict  # noqa: E402
from cm3leon.registry.registry import Version  # noqa: E402
from cm3leon.tracking.runs import FLOW_RUN_ENV  # noqa: E402
from cm3leon.utils.errors import UserError  # noqa: E402
from flows.approval import DECISION_HOURS, Hours, check_can_wait, propose, with_decision  # noqa: E402
from flows.notify import tell_failure, tell_promotion  # noqa: E402
from flows.session import dated, prefect_api, until_interrupted  # noqa: E402


@task(name="register", task_run_name="register", cache_policy=NO_CACHE, persist_result=False)
def register_task(config: Config) -> Version:
    """Bundle the stages' outputs and register them as challenger; an unchanged bundle makes no new version."""
    from cm3leon.registry import registry

    version = registry.register_outputs(config)
    get_run_logger().info("challenger is version %s", version)
    return version


@task(name="gate", task_run_name="gate", cache_policy=NO_CACHE, persist_result=False)
def gate_task(config: Config, registered: Version) -> State:
    """Compare challenger and champion, and publish the table as an artifact; ends Completed if the gate passes, else HeldBack."""
    from prefect.artifacts import create_markdown_artifact

    from cm3leon.registry import promotion

    verdict = promotion.gate(config, registered, registered.number)
    create_markdown_artifact(verdict.to_markdown(), key="gate-report", description="Scores of challenger and champion, limits, verdict")
    get_run_logger().info(str(verdict))
    return Completed(name="Completed" if verdict.passed else "HeldBack", message=str(verdict), data=verdict)


@task(name="promote", task_run_name="promote", cache_policy=NO_CACHE, persist_result=False)
def promote_task(number: str) -> str:
    """Make a version the champion; returns its version."""
    from cm3leon.registry import promotion

    return str(promotion.promote(number))


def register_gate_promote(config: Config, after: Sequence[State] = (), approval: bool = False) -> str:
    """Run the three tasks; returns the verdict in a sentence. A model that the gate holds back is no failure.

    Args:
        config: the project's parameters.
        after: states of the tasks that made the model; Prefect draws an edge from each.
        approval: let the version wait for a person's decision instead of promoting it (:mod:`flows.approval`).
    """
    registered = register_task(config, wait_for=after, return_state=True)
    version = registered.result()
    gated = gate_task(config, version, wait_for=[registered], return_state=True)
    verdict = cast(Verdict, gated.result())
    if not verdict.passed:
        tell_promotion("gate")
    if approval and verdict.champion != version.number:
        return propose(version, verdict)
    if not verdict.passed:
        return f"version {version} is not promoted, {verdict}"
    promote_task(version.number, wait_for=[gated])  # another run may have made another version the challenger
    tell_promotion("promote")
    return f"version {version} is the champion, {verdict}"


@flow(
    name="cm3leon-promotion",
    flow_run_name=lambda: dated("promotion"),
    persist_result=False,
    on_failure=[tell_failure],
    on_crashed=[tell_failure],
)
def promotion_flow(approval: bool = False, decision_hours: Hours = DECISION_HOURS) -> State:
    """Register the stages' outputs, gate them, and promote them if they pass, or if a person says so.

    Args:
        approval: let a person decide, also on a model that the gate holds back.
        decision_hours: how long the run waits for the decision; then it ends as failed, and nothing is promoted.
    """
    from cm3leon.config.loading import load_config

    def work() -> State:
        check_can_wait(approval)
        os.environ[FLOW_RUN_ENV] = str(flow_run.id)
        return Completed(message=register_gate_promote(load_config(), approval=approval))

    return with_decision(work, approval, decision_hours)


@flow(name="cm3leon-rollback", flow_run_name=lambda: dated("rollback"), persist_result=False)
def rollback() -> State:
    """Make the previous champion the champion again."""
    from cm3leon.registry import promotion

    return Completed(message=f"version {promotion.rollback()} is the champion again")


def main(arguments: list[str] | None = None) -> int:
    """Run the promotion or the rollback flow in this process; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flows.promotion", description="Register, gate and promote; or roll back.")
    parser.add_argument("--rollback", action="store_true", help="make the previous champion the champion again")
    options = parser.parse_args(arguments)
    try:
        check_server()
        with prefect_api():
            state = (rollback if options.rollback else promotion_flow)(return_state=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(state.message)
    return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(until_interrupted(main))
