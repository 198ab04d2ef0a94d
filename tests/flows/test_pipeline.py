"""The flow over a toy graph."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from flows_support import ROOT, TOY, make_toy

pytestmark = pytest.mark.slow


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str) -> Path:
    """The toy project as working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    make_toy(tmp_path)
    return tmp_path


def run_flow() -> Any:
    from flows.pipeline import pipeline

    return pipeline(promote=False, return_state=True)


def task_states(state: Any) -> dict[str, tuple[str, str]]:
    """Name -> (state name, message) of the flow run's task runs, as the server has them."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    with get_client(sync_client=True) as client:
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
        runs = client.read_task_runs(flow_run_filter=chosen)
    return {run.name: (run.state.name, run.state.message or "") for run in runs}  # type: ignore[misc]


def newest_flow_run() -> Any:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        return client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]


def test_stages_run_in_order_and_are_skipped_while_up_to_date(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = run_flow()
    assert state.is_completed()
    assert {name: found for name, (found, _) in task_states(state).items()} == dict.fromkeys(TOY, "Completed")
    shown = capsys.readouterr().out
    assert "rows 12" in shown
    assert "64" in shown

    state = run_flow()
    assert task_states(state) == dict.fromkeys(TOY, ("Skipped", "rows 12"))  # with the scores of the run that made the outputs
    assert {result["stage"]: result["metrics"] for result in state.result()} == {name: {"rows": 12} for name in TOY}

    params = Path("params.yaml")
    params.write_text("sft:\n  steps: 30\n")
    assert {n: s for n, (s, _) in task_states(run_flow()).items()} == {
        "first": "Skipped", "second": "Completed", "other": "Skipped", "third": "Skipped",
    }  # fmt: skip

    params.write_text("sft:\n  steps: 20\n")  # DVC restores the outputs of the first run without running the command
    assert task_states(run_flow())["second"] == ("Cached", "rows 12")


def test_the_graph_that_the_pages_draw_has_the_edges_of_the_stage_graph(toy: Path, prefect_server: str) -> None:
    flow_run = run_flow().state_details.flow_run_id
    with urllib.request.urlopen(f"{prefect_server}/flow_runs/{flow_run}/graph-v2") as answer:
        nodes = dict(json.load(answer)["nodes"])
    names = {node_id: node["label"] for node_id, node in nodes.items()}
    parents = {node["label"]: {names[parent["id"]] for parent in node["parents"]} for node in nodes.values()}
    assert parents == {"first": set(), "second": {"first"}, "other": {"first"}, "third": {"second", "other"}}


def test_a_project_outside_of_git_runs(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unpacked archive: DVC must be told that there is no repository before it is asked for the graph."""
    from flows.pipeline import main

    shutil.rmtree(".git")
    assert main(["--no-promote"]) == 0
    assert "rows 12" in capsys.readouterr().out
    run = newest_flow_run()
    assert re.fullmatch(r"small \d{4}-\d\d-\d\d \d\d:\d\d", run.name)
    assert set(run.tags) == {"cm3leon", "small"}


def test_a_run_that_does_not_fit_on_the_disk_is_refused_before_it_starts(
    toy: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from flows.pipeline import main

    stages = {"pretrain": {"cmd": "touch out", "params": ["pretrain.model.layers"], "outs": ["out"]}}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    layers = "pretrain:\n  model:\n    layers: {}\n"
    Path("params.yaml").write_text(layers.format(10**9))
    assert main(["--no-promote"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: this run writes about") and "TB (pretrain" in shown.err and "cm3leon gc" in shown.err
    assert not Path("out").exists()

    Path("params.yaml").write_text(layers.format(6))
    assert main(["--no-promote"]) == 0
    assert "disk: this run writes about" in caplog.text
    assert main(["--no-promote"]) == 0
    assert "disk: this run writes nothing" in caplog.text


def test_a_deployment_does_not_start_either_on_a_full_disk_or_without_the_store_that_promotion_needs(toy: Path) -> None:
    from flows.pipeline import pipeline

    stages = {"pretrain": {"cmd": "touch out", "params": ["pretrain.model.layers"], "outs": ["out"]}}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    Path("params.yaml").write_text(f"pretrain:\n  model:\n    layers: {10**9}\n")
    state = run_flow()
    assert state.is_failed() and state.message.startswith("this run writes about"), state.message
    state = pipeline(return_state=True)
    assert state.is_failed() and "the MLflow server http://127.0.0.1:9 does not answer" in state.message, state.message
    assert not Path("out").exists()


def test_a_failed_stage_shows_its_own_error_and_completed_stages_are_kept(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("fault.txt").write_text("yes")
    state = run_flow()
    assert state.is_failed()
    assert "row 7: no image" in state.message
    found = task_states(state)
    assert found["first"][0] == "Completed"
    assert found["second"][0] == "Failed"
    assert "error: data/manifest.csv, row 7: no image" in found["second"][1]
    assert found["other"][0] == "Completed"  # it does not depend on the failed one
    assert "third" not in found
    shown = capsys.readouterr().out
    assert "row 7: no image" in shown
    rows = {cells[1]: cells[2:4] for line in shown.splitlines() if len(cells := [cell.strip() for cell in line.split("│")]) > 3}
    assert rows["third"] == ["NotRun", ""]
    assert rows["second"][0] == "Failed" and float(rows["second"][1]) > 0

    Path("fault.txt").write_text("")
    state = run_flow()
    assert state.is_completed()
    found = task_states(state)
    assert found["first"][0] == found["other"][0] == "Skipped"
    assert found["second"][0] == found["third"][0] == "Completed"


def test_a_killed_stage_hints_at_memory(toy: Path) -> None:
    Path("fault.txt").write_text("killed")
    assert "probably because memory ran out" in task_states(run_flow())["second"][1]


def test_a_failed_registration_is_in_the_table_and_the_report(
    toy: Path, prepared_store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import pipeline as module

    def refuse(config: object, after: object, approval: bool) -> str:
        raise LookupError("the registry is not reachable")

    reports: list[str] = []
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    shutil.copyfile(prepared_store, "mlflow.db")
    monkeypatch.setattr(module, "register_gate_promote", refuse)
    monkeypatch.setattr(module, "_publish", lambda report, profile: reports.append(report))
    state = module.pipeline(return_state=True)
    assert state.is_failed()
    assert "the registry is not reachable" in state.message
    shown = capsys.readouterr().out
    assert "rows 12" in shown
    assert "the registry is not reachable" in shown
    assert "the registry is not reachable" in reports[0]


def test_nightly_deploys(prefect_server: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PREFECT_API_URL": prefect_server, "PREFECT_HOME": str(tmp_path)}

    def prefect(*arguments: str) -> str:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    prefect("work-pool", "create", "local", "--type", "process")
    prefect("deploy", "--all")
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        nightly = client.read_deployment_by_name("cm3leon/nightly")
    assert [schedule.active for schedule in nightly.schedules] == [False]


def test_a_run_is_cancelled_while_another_one_works_in_the_directory(toy: Path) -> None:
    from cm3leon.services.exclusive import alone_in_directory
    from flows.champion import evaluate_champion
    from flows.pipeline import main, pipeline
    from flows.promotion import promotion_flow

    with alone_in_directory():
        for flow in (pipeline, promotion_flow, evaluate_champion):
            state = flow(return_state=True)
            assert state.is_cancelled(), state
            assert state.message == f"another run works in {toy} (process {os.getpid()}); wait until it has ended, or stop it"
        assert main(["--no-promote"]) == 2
    assert not Path("out").exists()
    assert run_flow().is_completed()


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ({"profile": "huge"}, "there is no profile 'huge'; configs/ has: small"),
        ({"first_stage": "fourth"}, "first_stage 'fourth' is no stage; the stages are: first, second, other, third"),
        ({"first_stage": "second"}, "a run from second on needs stages that are out of date: first, other; run the whole pipeline once"),
        ({"first_stage": "first", "profile": "small"}, "profile and first_stage exclude each other: "),
        ({"approval": True}, "approval wants a run of a deployment, which goes on after the decision: "),
        ({"approval": True, "profile": "small"}, "approval wants a run of a deployment, which goes on after the decision: "),
    ],
)
def test_parameters_are_checked_before_anything_starts(toy: Path, parameters: dict[str, Any], error: str) -> None:
    from flows.pipeline import pipeline

    Path("configs").mkdir()
    Path("configs/small.yaml").write_text("profile: small\n")
    params = Path("params.yaml").read_text()
    state = pipeline(**parameters, promote=False, return_state=True)
    assert state.is_failed() and state.message.startswith(error), state.message
    assert "\n" not in state.message
    assert task_states(state) == {} and Path("params.yaml").read_text() == params and not Path("out").exists()


def test_a_run_from_a_stage_on_takes_the_others_as_they_are(toy: Path) -> None:
    from flows.pipeline import pipeline

    assert run_flow().is_completed()
    Path("params.yaml").write_text("sft:\n  steps: 30\n")
    state = pipeline(promote=False, first_stage="second", return_state=True)
    assert {name: found for name, (found, _) in task_states(state).items()} == {"second": "Completed", "third": "Skipped"}
