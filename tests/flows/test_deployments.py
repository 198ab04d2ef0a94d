"""Every deployment of prefect.yaml, run for real by a worker: a server, a worker process, a project of toy stages and untrained models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from flows_support import ROOT, make_toy

from cm3leon.config import paths
from cm3leon.config.schema import Config, ShapesConfig
from cm3leon.data.manifest import VALIDATED_SCHEMA, ImageStore, read_manifest
from cm3leon.data.packing import pack
from cm3leon.data.thumbnails import FEATURES, thumbnail_of, write_thumbnails
from cm3leon.evaluation.record import Record
from cm3leon.evaluation.run import evaluate
from cm3leon.registry import promotion, registry
from cm3leon.scenes import source as shapes
from cm3leon.sequence.tasks import Training
from cm3leon.services.environment import child_path
from cm3leon.services.exclusive import BusyError, alone_in_directory
from cm3leon.tracking import runs
from cm3leon.utils.processes import stop_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CONFIG = Config.model_validate(
    {
        "profile": "tiny",
        "decoding": {"candidates": 1, "retrieved_documents": 1, "max_text_tokens": 4},
        "gate": {"floors": {}, "margins": {}},
        "evaluate": {"prompts": 4, "captions": 2, "questions": 4, "tasks": 2, "sheet": 2, "bootstrap": 10},
    }
)
DECISION = {"decision": "approve", "reason": "the colors are right", "name": "Anna"}


FLOWS = {"promote": "-promotion", "evaluate-champion": "-champion"}
"""What stands after the flow's name, cm3leon, by deployment."""


@dataclass
class Workspace:
    """The project, in which the worker runs deployments; ``log`` is the worker's."""

    root: Path
    log: Path

    def start(self, deployment: str, **parameters: Any) -> Any:
        """Start a run of a deployment, as the button in the UI does."""
        from prefect.deployments import run_deployment

        self.wait_until_free()
        return run_deployment(f"cm3leon{FLOWS.get(deployment, '')}/{deployment}", parameters=parameters, timeout=0)

    def wait_until_free(self, seconds: float = 60) -> None:
        """Wait until no run works in the directory: one that the schedule started late may."""
        end = time.monotonic() + seconds
        while True:
            try:
                with alone_in_directory():
                    return
            except BusyError:
                assert time.monotonic() < end, self.log.read_text()[-8000:]
                time.sleep(0.5)

    def run(self, deployment: str, **parameters: Any) -> Any:
        """The final state of a run."""
        return self.wait(self.start(deployment, **parameters).id, lambda state: state.is_final())

    def wait(self, run_id: Any, wanted: Callable[[Any], bool], seconds: float = 90) -> Any:
        """The state of a run once it is as wanted."""
        from prefect import get_client

        end = time.monotonic() + seconds
        with get_client(sync_client=True) as client:
            while not wanted(state := client.read_flow_run(run_id).state):
                assert time.monotonic() < end and not state.is_final(), f"{state}\n{self.log.read_text()[-8000:]}"
                time.sleep(0.5)
        return state


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: Any, tiny_models: Path, prepared_store: Path, prefect_server: str) -> Iterator[Workspace]:
    root = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in ("MLFLOW_TRACKING_URI", runs.PARENT_RUN_ENV, runs.FLOW_RUN_ENV):
            patch.delenv(name, raising=False)
        make_project(root, tiny_models, prepared_store)
        environment = {**os.environ, "PREFECT_API_URL": prefect_server, "PREFECT_HOME": str(root / "home"), "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": f"{root}{os.pathsep}{ROOT}", "PREFECT_WORKER_QUERY_SECONDS": "1"}
        log = root / "worker.log"
        prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
        with log.open("w") as output:
            options: dict[str, Any] = {"cwd": root, "env": environment, "stdout": output, "stderr": subprocess.STDOUT}
            subprocess.run([*prefect, "work-pool", "create", "local", "--type", "process", "--overwrite"], check=True, **options)
            subprocess.run([*prefect, "deploy", "--all"], check=True, **options)
            worker = subprocess.Popen([*prefect, "worker", "start", "--pool", "local"], **options)
            try:
                yield Workspace(root, log)
            finally:
                stop_tree(worker.pid)
                subprocess.run([*prefect, "work-pool", "delete", "local"], check=True, **options)


def make_project(root: Path, tiny_models: Path, store: Path) -> None:
    """Toy stages, the flows and deployments of this project, and models with data and an evaluation; working directory is ``root``."""
    make_toy(root)
    shutil.copyfile(store, root / "mlflow.db")
    for name in ("models", "data"):
        shutil.copytree(tiny_models / name, root / name, dirs_exist_ok=True)
    for name in ("flows", "configs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "prefect.yaml", root / "prefect.yaml")
    (root / "params.yaml").write_text(yaml.safe_dump(CONFIG.model_dump(mode="json", by_alias=True)))
    pack(shapes.rows(ShapesConfig(count=9, edits=1.0, conditions=1.0, seed=1), paths.RAW), paths.RAW, 32)
    train = read_manifest(paths.VALIDATED).assign(row=0)  # the documents of the memory bank, of which nothing reads the images
    frame = read_manifest(paths.RAW).assign(width=64, height=64, split="test")
    records = pd.concat([train, frame[VALIDATED_SCHEMA.names]]).to_dict("records")
    pq.write_table(pa.Table.from_pylist(records, schema=VALIDATED_SCHEMA), paths.VALIDATED / "manifest.parquet")
    images = ImageStore(paths.RAW)
    thumbnails = [bytes([number]) * FEATURES for number in range(len(train))] + [thumbnail_of(images.open(ref)) for ref in frame["image"]]
    write_thumbnails(paths.VALIDATED, [record["id"] for record in records], thumbnails)
    Training(frozenset({"text_to_image", "caption"}), masked_prompts=True).write(paths.FINETUNED)
    evaluate(CONFIG, paths.EVALUATION)


def resume(server: str, run_id: Any, decision: dict[str, str]) -> str:
    """Give a decision by Prefect's API; returns the answer's status: ACCEPT or REJECT."""
    for _ in range(20):
        answer = httpx.post(f"{server}/flow_runs/{run_id}/resume", json={"run_input": decision}, timeout=30)
        if answer.status_code != 503:  # the server's SQLite file is locked for a moment
            break
        time.sleep(1)
    answer.raise_for_status()
    return str(answer.json()["status"])


def is_paused(state: Any) -> bool:
    return bool(state.is_paused())


def champion() -> str | None:
    return next((version.number for version in registry.status() if "champion" in version.aliases), None)


def another_model(steps: int) -> None:
    """Change a score in the record, so that what is registered next is another version."""
    record = Record.read(paths.EVALUATION)
    record.scores["steps"] = steps
    record.write(paths.EVALUATION)


def scheduled_run(deployment: str, seconds: float = 150) -> Any:
    """The first run of a deployment that a schedule has made and that has started."""
    from prefect import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

    chosen = DeploymentFilter(name=DeploymentFilterName(any_=[deployment]))
    end = time.monotonic() + seconds
    with get_client(sync_client=True) as client:
        while time.monotonic() < end:
            started = [run for run in client.read_flow_runs(deployment_filter=chosen) if run.auto_scheduled and run.start_time]
            if started:
                return started[0]
            time.sleep(1)
    return None


def set_schedule(deployment: str, seconds: int | None) -> None:
    """Start a deployment every ``seconds``, with approval; None removes its schedules."""
    from prefect import get_client
    from prefect.client.schemas.actions import DeploymentUpdate
    from prefect.client.schemas.schedules import IntervalSchedule

    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name(f"cm3leon/{deployment}")
        for schedule in found.schedules:
            client.delete_deployment_schedule(found.id, schedule.id)
        if seconds:
            client.update_deployment(found.id, DeploymentUpdate(parameters={"approval": True}))
            client.create_deployment_schedules(found.id, [(IntervalSchedule(interval=timedelta(seconds=seconds)), True)])


def test_a_scheduled_run_starts_by_itself_and_ends_with_a_promotion_that_waited_for_approval(
    workspace: Workspace, prefect_server: str
) -> None:
    definition = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    schedules = {deployment["name"]: deployment.get("schedules", []) for deployment in definition["deployments"]}
    assert schedules["nightly"] == [{"cron": "0 2 * * *", "timezone": "UTC", "active": False}]
    assert [schedule["active"] for schedule in schedules["evaluate-champion"]] == [False]
    set_schedule("nightly", 10)
    run = scheduled_run("nightly")
    set_schedule("nightly", None)
    assert run is not None, workspace.log.read_text()[-4000:]
    assert run.name.startswith("tiny ") and "cm3leon" in run.tags

    state = workspace.wait(run.id, is_paused)
    assert (workspace.root / "out/third").is_file()
    assert state.name == "Suspended" and state.state_details.pause_timeout
    assert champion() is None
    for wrong in ({"decision": "perhaps", "reason": "x", "name": "y"}, DECISION | {"reason": " "}, {"decision": "approve"}):
        assert resume(prefect_server, run.id, wrong) == "REJECT"
    another_model(1)  # what is decided on is what was shown
    assert resume(prefect_server, run.id, DECISION) == "ACCEPT"
    state = workspace.wait(run.id, lambda state: state.is_final())
    assert (state.name, state.message) == ("Completed", "version 1 is the champion, approved by Anna: the colors are right")
    assert champion() == "1"
    promoted, gated, *_ = promotion.history()
    assert (gated.action, promoted.action, promoted.version, promoted.forced) == ("gate", "promote", "1", False)
    assert promoted.reason == "approved by Anna: the colors are right" and promoted.flow_run == str(run.id)


def test_a_person_or_a_time_limit_rejects_and_nobody_is_asked_twice(workspace: Workspace, prefect_server: str) -> None:
    before = champion()
    another_model(2)
    run = workspace.start("promote")
    workspace.wait(run.id, is_paused)
    assert f"waits for a decision already, in the flow run {run.name!r}" in promoted_by_hand()
    assert resume(prefect_server, run.id, {"decision": "reject", "reason": "no faces", "name": "Ben"}) == "ACCEPT"
    state = workspace.wait(run.id, lambda state: state.is_final())
    assert state.name == "Rejected" and state.message.endswith("is not promoted, rejected by Ben: no faces")
    entry = promotion.history()[0]
    assert (entry.action, entry.reason, entry.flow_run) == ("reject", "rejected by Ben: no faces", str(run.id))
    assert "is not promoted: rejected by Ben: no faces" in promoted_by_hand()

    another_model(3)
    state = workspace.run("promote", approval=True, decision_hours=0.001)
    assert state.is_failed() and state.message == "The flow was paused and never resumed."
    assert champion() == before


def promoted_by_hand() -> str:
    """What another run with approval says about the same version."""
    from prefect import flow

    from flows.promotion import register_gate_promote

    return str(flow(register_gate_promote)(CONFIG, approval=True))


def test_tune_starts_at_its_first_stage(workspace: Workspace) -> None:
    deployments = {deployment["name"]: deployment for deployment in yaml.safe_load(Path("prefect.yaml").read_text())["deployments"]}
    assert deployments["tune"]["parameters"] == {"first_stage": "sft"}
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], check=True, env={**os.environ, "PATH": child_path()})
    state = workspace.run("tune", first_stage="other", promote=False)
    assert state.is_completed(), state.message
    assert task_names(state) == {"other", "third"}


def test_evaluate_champion_fails_with_an_event_once_a_score_left_its_interval(workspace: Workspace, prefect_server: str) -> None:
    from flows.champion import evaluate_champion

    another_model(5)
    promotion.promote(registry.register_outputs(CONFIG).number, force=True, reason="a test")
    state = evaluate_champion(return_state=True)
    assert state.is_completed() and "scores are in their intervals" in state.message, state.message

    record = Record.read(paths.EVALUATION)
    kept = record.scores["clip_score"], record.intervals["clip_score"]
    record.scores["clip_score"], record.intervals["clip_score"] = 50.0, (49.0, 51.0)
    record.write(paths.EVALUATION)
    promotion.promote(registry.register_outputs(CONFIG).number, force=True, reason="a test")
    record.scores["clip_score"], record.intervals["clip_score"] = kept
    record.write(paths.EVALUATION)
    state = workspace.run("evaluate-champion")
    assert (state.name, state.type.value) == ("ScoreLeftInterval", "FAILED")
    assert f"version {champion()} left its intervals: clip_score" in state.message and "(recorded 50 [49, 51])" in state.message
    [event] = events(prefect_server, "cm3leon.champion.score-left-interval")
    assert event["resource"]["prefect.resource.id"] == f"cm3leon.model.cm3leon.{champion()}" and list(event["payload"]["scores"]) == [
        "clip_score"
    ]


def test_impossible_parameters_are_refused_before_there_is_a_run(workspace: Workspace) -> None:
    from prefect.exceptions import PrefectHTTPStatusError

    for parameters in ({"decision_hours": -1}, {"promote": "perhaps"}):
        with pytest.raises(PrefectHTTPStatusError, match="Error creating flow run"):
            workspace.start("nightly", **parameters)


def task_names(state: Any) -> set[str]:
    """Names of the task runs of a finished flow run."""
    from prefect import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    with get_client(sync_client=True) as client:
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
        return {run.name for run in client.read_task_runs(flow_run_filter=chosen)}


def events(server: str, name: str, seconds: float = 15) -> list[dict[str, Any]]:
    """The events of this name; waits until there is one."""
    end = time.monotonic() + seconds
    while True:
        answer = httpx.post(f"{server}/events/filter", json={"filter": {"event": {"name": [name]}}})
        answer.raise_for_status()
        found: list[dict[str, Any]] = answer.json()["events"]
        if found or time.monotonic() > end:
            return found
        time.sleep(0.5)
