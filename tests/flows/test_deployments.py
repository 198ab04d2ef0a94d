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
from flows_support import ROOT, Webhook, events, make_toy, webhook

from cm3leon.config import paths
from cm3leon.config.ingest_schema import ShapesConfig
from cm3leon.config.schema import Config
from cm3leon.data.manifest import VALIDATED_SCHEMA, ImageStore, read_manifest
from cm3leon.data.packing import pack
from cm3leon.data.thumbnails import FEATURES, thumbnail_of, write_thumbnails
from cm3leon.evaluation.record import Record
from cm3leon.evaluation.run import evaluate
from cm3leon.registry import promotion, registry
from cm3leon.scenes import source as shapes
from cm3leon.sequence.tasks import Training
from cm3leon.services import worktree
from cm3leon.services.automations import WAITS
from cm3leon.services.environment import child_path
from cm3leon.services.exclusive import BusyError, alone_in_directory
from cm3leon.services.worktree import WORKTREE
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
                with alone_in_directory(), worktree.held(self.root):
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
        environment |= {"PYTHONPATH": f"{root}{os.pathsep}{ROOT}", "PATH": child_path(), "PREFECT_WORKER_QUERY_SECONDS": "1"}
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


SECRET = "T0KEN"
"""In the webhook's address, as one of Slack's has it."""


@pytest.fixture(scope="module")
def inbox(prefect_server: str) -> Iterator[Webhook]:
    """What the runs send by the block custom-webhook/cm3leon."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    with webhook() as server:
        block = CustomWebhookNotificationBlock(
            name="team",
            url=f"{server.address}/{{{{token}}}}",
            json_data={"subject": "{{subject}}", "body": "{{body}}"},
            secrets={"token": SECRET},
        )
        block.save("cm3leon")
        try:
            yield server
        finally:
            CustomWebhookNotificationBlock.delete("cm3leon")


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
    (root / ".gitignore").write_text(".cache/\n/home/\n/out/\n/mlflow.db*\n/mlruns/\n*.log\n.prefect\n.services\n__pycache__/\n")
    commit("the project")


def commit(message: str) -> None:
    """Commit all that git does not ignore, models too: what runs of deployments get."""
    subprocess.run(["git", "add", "--all"], check=True)
    subprocess.run(["git", "-c", "user.name=me", "-c", "user.email=me@here", "commit", "--quiet", "-m", message], check=True)


def resume(server: str, run_id: Any, decision: dict[str, str]) -> str:
    """Give a decision by Prefect's API; returns the answer's status: ACCEPT or REJECT."""
    for _ in range(20):
        answer = httpx.post(f"{server}/flow_runs/{run_id}/resume", json={"run_input": decision}, timeout=30)
        if answer.status_code != 503:  # the server's SQLite file is locked for a moment
            break
        time.sleep(1)
    answer.raise_for_status()
    return str(answer.json()["status"])


def pipeline_tags() -> list[dict[str, str]]:
    """Tags of MLflow's runs of the pipeline."""
    client = registry.connect()
    experiment = client.get_experiment_by_name("cm3leon")
    return [run.data.tags for run in client.search_runs([experiment.experiment_id], "tags.stage = 'pipeline'")]


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def is_paused(state: Any) -> bool:
    return bool(state.is_paused())


def champion() -> str | None:
    return next((version.number for version in registry.status() if "champion" in version.aliases), None)


def another_model(steps: int) -> None:
    """Change a score in the record, so that what is registered next is another version."""
    record = Record.read(paths.EVALUATION)
    record.scores["steps"] = steps
    record.write(paths.EVALUATION)


def runs_of(deployment: str) -> list[Any]:
    """The runs of a deployment."""
    from prefect import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

    with get_client(sync_client=True) as client:
        return client.read_flow_runs(deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[deployment])))


def scheduled_run(deployment: str, seconds: float = 150) -> Any:
    """The first run of a deployment that a schedule has made and that has started."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        started = [run for run in runs_of(deployment) if run.auto_scheduled and run.start_time]
        if started:
            return started[0]
        time.sleep(1)
    return None


def set_schedule(deployment: str, cron: str | None) -> None:
    """Start a deployment by a schedule, with approval; None removes its schedules."""
    from prefect import get_client
    from prefect.client.schemas.actions import DeploymentUpdate
    from prefect.client.schemas.schedules import CronSchedule

    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name(f"cm3leon/{deployment}")
        for schedule in found.schedules:
            client.delete_deployment_schedule(found.id, schedule.id)
        if cron:
            client.update_deployment(found.id, DeploymentUpdate(parameters={"approval": True}))
            client.create_deployment_schedules(found.id, [(CronSchedule(cron=cron), True)])


def test_a_scheduled_run_starts_by_itself_and_ends_with_a_promotion_that_waited_for_approval(
    workspace: Workspace, prefect_server: str, inbox: Webhook
) -> None:
    definition = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    schedules = {deployment["name"]: deployment.get("schedules", []) for deployment in definition["deployments"]}
    assert schedules["nightly"] == [{"cron": "0 2 * * *", "timezone": "UTC", "active": False}]
    assert [schedule["active"] for schedule in schedules["evaluate-champion"]] == [False]
    set_schedule("nightly", "* * * * *")
    run = scheduled_run("nightly")
    set_schedule("nightly", None)
    assert run is not None, workspace.log.read_text()[-4000:]
    assert run.name.startswith("tiny ") and "cm3leon" in run.tags

    state = workspace.wait(run.id, is_paused)
    assert (workspace.root / WORKTREE / "out/third").is_file()
    assert not (workspace.root / "out").exists() and not (workspace.root / "dvc.lock").exists()
    assert state.name == "Suspended"
    until = state.state_details.pause_timeout
    assert events(prefect_server, WAITS, f"prefect.flow-run.{run.id}"), "silent from now on, and not crashed"
    assert champion() is None
    for wrong in ({"decision": "perhaps", "reason": "x", "name": "y"}, DECISION | {"reason": " "}, {"decision": "approve"}):
        assert resume(prefect_server, run.id, wrong) == "REJECT"
    another_model(1)  # what is decided on is what was shown
    assert resume(prefect_server, run.id, DECISION) == "ACCEPT"
    state = workspace.wait(run.id, lambda state: state.is_final())
    assert (state.name, state.message) == ("Completed", "version 1 is the champion, approved by Anna: the colors are right")
    assert champion() == "1"
    promoted, proposed, gated, *_ = promotion.history()
    assert (gated.action, proposed.action, promoted.action, promoted.version) == ("gate", "propose", "promote", "1")
    assert not promoted.forced and proposed.flow_run == str(run.id)
    assert proposed.until and abs(proposed.until - until) < timedelta(minutes=1)
    assert promoted.reason == "approved by Anna: the colors are right" and promoted.flow_run == str(run.id)
    [saved] = [tags["dvc_experiment"] for tags in pipeline_tags() if "dvc_experiment" in tags]
    assert saved.startswith("run-tiny-") and saved in git("for-each-ref", "refs/exps")
    assert git("status", "--short") == " M models/evaluation/record.json\n"  # another_model
    message = inbox.wait_for("version 1 is the champion")
    [again] = [found for found in runs_of("nightly") if found.id == run.id]  # named anew after the decision
    assert message["body"].splitlines() == [
        f"run {again.name}, {promoted.who}: promoted version 1, no champion before",
        "passed against no champion",
        "reason: approved by Anna: the colors are right",
        page(prefect_server, run),
    ]
    assert message["path"] == f"/{SECRET}" and len(inbox.messages) == 1


def test_a_person_or_a_time_limit_rejects_and_nobody_is_asked_twice(workspace: Workspace, prefect_server: str, inbox: Webhook) -> None:
    before = champion()
    another_model(2)
    started = workspace.start("promote")
    workspace.wait(started.id, is_paused)
    [run] = [found for found in runs_of("promote") if found.id == started.id]  # named when it began
    assert run.name.startswith("promotion 2")
    gated = promotion.history()[1]
    message = inbox.wait_for(f"version {gated.version} is held back by the gate")
    assert message["body"].splitlines() == [f"run {run.name}, {gated.who}: {gated.sentence}", gated.verdict, page(prefect_server, run)]
    assert "held back (" in gated.verdict and "no score of both has a margin" in gated.verdict
    inbox.status = 500
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
    rejected, proposed, gated = promotion.history()[:3]
    assert (rejected.action, proposed.action, gated.action) == ("reject", "propose", "gate")
    assert (rejected.who, rejected.flow_run) == ("time limit", proposed.flow_run)
    assert "is not promoted: nobody decided within the time limit" in promoted_by_hand()
    inbox.status = 200
    inbox.wait_for(f"version {promotion.history()[0].version} is held back")
    warnings = [line for line in log_of(state) if "message" in line]
    assert warnings == ["no message was sent by the block custom-webhook/cm3leon: HTTPStatusError, status 500"]
    assert SECRET not in "\n".join(log_of(state)) + workspace.log.read_text()


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


def test_data_that_changed_start_a_run_whose_failure_is_told(workspace: Workspace, prefect_server: str, inbox: Webhook) -> None:
    workspace.wait_until_free()
    Path("fault.txt").write_text("broken")
    commit("a fault")
    command = [sys.executable, "-m", "cm3leon", "data", "changed", "fault.txt"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_API_URL": prefect_server}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert told.stdout == f"fault.txt is modified: event cm3leon.data.changed sent to {prefect_server}\n", told.stderr
    message = inbox.wait_for("Failed", 60)
    [run] = runs_of("on-data-change")
    assert message["subject"] == f"cm3leon: run {run.name} Failed"
    lines = message["body"].splitlines()
    assert lines[:2] == ["stage second failed:", "error: data/manifest.csv, row 7: no image"] and lines[-1] == page(prefect_server, run)
    [event] = events(prefect_server, "cm3leon.data.changed", "cm3leon.data.fault.txt")
    assert event["payload"]["project"] == str(workspace.root)
    Path("fault.txt").write_text("")
    commit("no fault")


def test_evaluate_champion_fails_with_an_event_once_a_score_left_its_interval(
    workspace: Workspace, prefect_server: str, inbox: Webhook
) -> None:
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
    message = inbox.wait_for("ScoreLeftInterval")
    assert message["body"].splitlines()[0] == state.message
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


def log_of(state: Any) -> list[str]:
    """The lines of a finished flow run's log."""
    from prefect import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    with get_client(sync_client=True) as client:
        chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[state.state_details.flow_run_id]))
        return [line.message for line in client.read_logs(chosen)]


def page(server: str, run: Any) -> str:
    """The address of a flow run's page."""
    return f"{server.removesuffix('/api')}/runs/flow-run/{run.id}"
