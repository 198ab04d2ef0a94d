"""A promotion that waits for a person: the flow run is suspended, and starts again in a new process once there is a decision.

A person decides on the flow run's page in Prefect, or through its API (``prefect.flow_runs.resume_flow_run``). No process waits meanwhile.
"""

from __future__ import annotations

import atexit
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal
from uuid import UUID

from prefect import get_client, suspend_flow_run
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import State, StateType
from prefect.input import RunInput
from prefect.runtime import deployment, flow_run
from prefect.states import Completed, Failed
from pydantic import BaseModel, Field

from cm3leon.registry.gate import Verdict
from cm3leon.registry.registry import Version
from cm3leon.services.automations import WAITS
from cm3leon.services.environment import ServerError
from cm3leon.services.events import emit
from cm3leon.tracking.runs import FLOW_RUN_ENV
from cm3leon.utils.errors import UserError
from flows.notify import tell_promotion
from flows.session import alone, send_pending

VERSION, PASSED, CHAMPION, VERDICT = "cm3leon.version", "cm3leon.passed", "cm3leon.champion", "cm3leon.verdict"
"""Labels of a flow run: the version that waits, the gate's verdict, and against which champion (none: empty). So the decision is on what
was shown, whatever runs meanwhile."""
Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
Hours = Annotated[float, Field(gt=0)]
ORDER_SECONDS = 2.0
"""Prefect's server may take two events that are closer together in the wrong order."""
DECISION_HOURS = 72.0
"""How long a promotion waits for a decision."""


class Decision(RunInput):
    """What a person decides, in a form of the flow run's page."""

    decision: Literal["approve", "reject"]
    reason: Text
    name: Text = Field(description="who decides")


class Candidate(BaseModel):
    """A version that waits for a decision, and the gate's verdict, against the champion of then."""

    version: str
    passed: bool
    champion: str | None
    verdict: str


def check_can_wait(approval: bool) -> None:
    """Raises :class:`UserError` if a run with approval is not of a deployment: nothing would start it again."""
    if approval and deployment.id is None:
        raise UserError("approval wants a run of a deployment, which goes on after the decision: prefect deployment run cm3leon/nightly")


def propose(version: Version, verdict: Verdict) -> str:
    """Let a version wait for a decision in this flow run, unless it was decided on or waits in another one; says which."""
    from cm3leon.registry import promotion

    if known := promotion.rejection(version.number):
        return f"version {version} is not promoted: {known.reason}; cm3leon promote --version {version} promotes it all the same"
    with get_client(sync_client=True) as client:
        paused = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED])))
        for run in client.read_flow_runs(flow_run_filter=paused):
            if run.labels.get(VERSION) == version.number:
                return f"version {version} waits for a decision already, in the flow run {run.name!r}"
        labels: dict[str, bool | int | float | str] = {
            VERSION: version.number, PASSED: verdict.passed, CHAMPION: verdict.champion or "", VERDICT: str(verdict)
        }  # fmt: skip
        client.update_flow_run_labels(UUID(flow_run.id), labels)
    return f"version {version} waits for a decision, {verdict}"


def candidate(approval: bool = True) -> Candidate | None:
    """The version for which this flow run waits, or has waited; None if there is none, or no ``approval`` is wanted."""
    if not approval:
        return None
    with get_client(sync_client=True) as client:
        labels = client.read_flow_run(UUID(flow_run.id)).labels
    if VERSION not in labels:
        return None
    champion = str(labels.get(CHAMPION, "")) or None
    return Candidate(version=str(labels[VERSION]), passed=bool(labels[PASSED]), champion=champion, verdict=str(labels[VERDICT]))


def with_decision(work: Callable[[], State], approval: bool, hours: float) -> State:
    """The work of a flow, alone in this directory, and the decision about the version that it proposed.

    A run that starts again after its decision does not work again.

    Returns:
        what ``work`` (through :func:`~flows.session.alone`) or :func:`decide` returned.
    """
    from cm3leon.registry import promotion

    if waiting := candidate(approval):
        return decide(waiting, hours)
    state = alone(work)
    waiting = candidate(approval)
    if waiting is None:
        return state
    promotion.propose(waiting.version, datetime.now(UTC) + timedelta(hours=hours))
    return decide(waiting, hours)


def decide(waiting: Candidate, hours: float) -> State:
    """Suspend this flow run until there is a decision, then carry it out; after ``hours`` Prefect ends the run as failed."""
    os.environ[FLOW_RUN_ENV] = str(flow_run.id)
    atexit.register(tell_wait, str(flow_run.id), str(flow_run.flow_name))
    form = Decision.with_initial_data(f"Shall version {waiting.version} become the champion? The gate: {waiting.verdict}")
    return carry_out(waiting, suspend_flow_run(wait_for_input=form, timeout=math.ceil(hours * 3600), key="decision"))


def tell_wait(run_id: str, flow_name: str) -> None:
    """Tell Prefect's server that a flow run waits: at the exit of its process, after the heartbeats that may be sent until then."""
    send_pending()
    time.sleep(ORDER_SECONDS)
    flow = {"prefect.resource.id": f"prefect.flow.{flow_name}", "prefect.resource.role": "flow", "prefect.resource.name": flow_name}
    with suppress(ServerError):
        emit(WAITS, {"prefect.resource.id": f"prefect.flow-run.{run_id}"}, {}, [flow])


def carry_out(waiting: Candidate, made: Decision) -> State:
    """Promote the version, by force if the gate held it back, or reject it; the ledger and the state say who decided and why.

    Returns:
        Completed, named Rejected if the version was rejected; Failed if another version became the champion since the gate.
    """
    from cm3leon.registry import promotion

    if made.decision == "reject":
        entry = promotion.reject(waiting.version, f"rejected by {made.name}: {made.reason}")
        return Completed(name="Rejected", message=f"version {waiting.version} is not promoted, {entry.reason}")
    reason = f"approved by {made.name}: {made.reason}"
    champion = promotion.champion()
    if champion is not None and champion.number not in (waiting.champion, waiting.version):
        against = f"version {waiting.champion}" if waiting.champion else "no champion"
        return Failed(
            message=f"version {waiting.version} is not promoted: it was compared with {against}; the champion is version {champion}"
        )
    try:
        promotion.promote(waiting.version, force=not waiting.passed, reason=reason)
    except promotion.PromotionError as error:
        return Failed(message=str(error))
    tell_promotion("promote")
    return Completed(message=f"version {waiting.version} is the champion, {reason}")
