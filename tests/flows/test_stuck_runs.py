"""A flow run that sends no heartbeats any more is marked as crashed by a real server; one that waits for a person is not."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable
from uuid import UUID

import pytest
import yaml
from flows_support import ROOT

from cm3leon.services import automations
from cm3leon.services.automations import CRASHED, HEARTBEAT_SECONDS, SILENT_SECONDS, STUCK_RUNS, mark_stuck_runs
from cm3leon.services.events import emit, post

LEAST = 10
"""Seconds that Prefect lets an automation wait for at least."""


def test_every_run_sends_heartbeats_as_often_as_the_automation_expects() -> None:
    assert tomllib.loads((ROOT / "prefect.toml").read_text())["flows"]["heartbeat_frequency"] == HEARTBEAT_SECONDS
    for deployment in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]:
        assert deployment["work_pool"]["job_variables"]["env"] == {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS)}
    assert 2 * HEARTBEAT_SECONDS < SILENT_SECONDS <= 80  # seconds more until the server has looked


@pytest.mark.slow
def test_a_silent_run_crashes_and_neither_a_living_one_nor_one_that_waits(monkeypatch: pytest.MonkeyPatch, prefect_server: str) -> None:
    from prefect import Flow, flow, get_client
    from prefect.states import Paused, Running

    from flows.approval import tell_wait

    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    quick = {**STUCK_RUNS, "name": "stuck runs of a test", "trigger": {**STUCK_RUNS["trigger"], "within": LEAST}}
    monkeypatch.setattr(automations, "STUCK_RUNS", quick)
    mark_stuck_runs()
    mark_stuck_runs()
    [made] = post("automations/filter", {"automations": {"name": {"any_": [quick["name"]]}}})

    @flow(name="cm3leon-test")
    def ours() -> None:
        """Nothing."""

    @flow(name="another project's")
    def theirs() -> None:
        """Nothing."""

    def heartbeat(run_id: UUID, work: Flow[[], None] = ours) -> None:
        related = {"prefect.resource.id": "prefect.flow.1", "prefect.resource.role": "flow", "prefect.resource.name": work.name}
        emit("prefect.flow-run.heartbeat", {"prefect.resource.id": f"prefect.flow-run.{run_id}"}, {}, [related])

    with get_client(sync_client=True) as client:

        def started(work: Flow[[], None] = ours) -> UUID:
            run_id = client.create_flow_run(work, state=Running()).id
            heartbeat(run_id, work)
            return run_id

        def name(run_id: UUID) -> str:
            state = client.read_flow_run(run_id).state
            assert state
            return str(state.name)

        try:
            living, silent, waiting, other = started(), started(), started(), started(theirs)
            client.set_flow_run_state(waiting, Paused(timeout_seconds=600), force=True)
            heartbeat(waiting)  # its process may send one more
            tell_wait(str(waiting), ours.name)
            until(lambda: name(silent) == "Crashed", every=lambda: heartbeat(living))
            state = client.read_flow_run(silent).state
            assert state and state.message == CRASHED
            time.sleep(5)  # as often as the server looks
            assert [name(run_id) for run_id in (living, waiting, other)] == ["Running", "Paused", "Running"]
        finally:
            client.delete_automation(UUID(made["id"]))


def until(condition: Callable[[], bool], every: Callable[[], None], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        every()
        time.sleep(1)
