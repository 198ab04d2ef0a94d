"""New data of another kind stops a run before training, until a person accepts it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from flows_support import ROOT
from registry_support import CONFIG, released, write_shard

from cm3leon.config import paths
from cm3leon.registry import registry

pytestmark = pytest.mark.slow

MANIFEST = str(paths.VALIDATED / "manifest.parquet")
STAGES = {
    "validate": {"cmd": f"mkdir -p data/validated && cp new.parquet {MANIFEST}", "deps": ["new.parquet"], "outs": [MANIFEST]},
    "train": {"cmd": f"cp {MANIFEST} trained", "deps": [MANIFEST], "outs": ["trained"]},
    "other": {"cmd": "cp new.parquet other", "deps": ["new.parquet"], "outs": ["other"]},
    "tune": {"cmd": "cp trained tuned", "deps": ["trained"], "outs": ["tuned"]},
}
"""The stages of a toy project: all but ``other`` need the validated data."""


@pytest.fixture
def collection(stages: Path, prefect_server: str) -> pd.DataFrame:
    """The project with untrained models and those stages; returns the manifest of its data, which is not validated yet."""
    subprocess.run(["git", "init", "--quiet"], check=True)
    shutil.copytree(ROOT / ".dvc", ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    Path("params.yaml").write_text(yaml.safe_dump(CONFIG.model_dump(mode="json", by_alias=True)))
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}, sort_keys=False))
    write_shard()
    Path(MANIFEST).rename("new.parquet")
    return pd.read_parquet("new.parquet")


def run_flow(**parameters: Any) -> tuple[Any, dict[str, tuple[str, str]]]:
    """The state of a run, and of its tasks: name -> (state's name, message)."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    from flows.pipeline import pipeline

    state = pipeline(**parameters, return_state=True)
    with get_client(sync_client=True) as client:
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
        found = client.read_task_runs(flow_run_filter=chosen)
    return state, {run.name: (run.state.name or "", run.state.message or "") for run in found if run.state}


def states_in(table: str) -> dict[str, str]:
    """Stage -> state, read from the final table."""
    rows = [[cell.strip() for cell in line.split("│")] for line in table.splitlines()]
    return {row[1]: row[2] for row in rows if len(row) > 3 and row[1] in (*STAGES, "drift")}


def test_data_of_another_kind_stops_a_run_before_training_until_a_person_accepts_it(
    collection: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect.artifacts import Artifact

    from flows.pipeline import main

    _, tasks = run_flow(promote=False)
    assert tasks["drift"] == ("Skipped", "there is no champion yet whose data could be compared")
    released(0.5)

    collection.assign(licence="CC-BY-4.0").to_parquet("new.parquet")
    capsys.readouterr()
    state, tasks = run_flow()
    assert state.is_failed() and tasks.keys() == {"validate", "drift", "other"}  # neither trained nor registered
    for part in (
        "the data has drifted from that of the champion, version 1: 100% of the documents have another license than before; new: CC-BY-4.0",
        ", drift.max_license_shift is 0.2; see .cache/drift.html. Nothing was trained.",
        "run again with --accept-drift (make run ACCEPT_DRIFT=1, or the parameter accept_drift of a deployment), or raise the limits",
    ):
        assert part in state.message
    assert Path("trained").read_bytes() != Path("new.parquet").read_bytes() == Path("other").read_bytes()
    assert [version.aliases for version in registry.status()] == [["challenger", "champion"]]
    report = Artifact.get("drift-report")
    assert report is not None and "| **past the limit** |" in str(report.data) and "/.cache/drift.html" in str(report.data)
    client = registry.connect()
    [stopped, *_] = client.search_runs([client.get_experiment_by_name("cm3leon").experiment_id], "tags.stage = 'pipeline'")
    assert stopped.info.status == "FAILED" and stopped.data.metrics["drift/license_shift"] == 1.0
    assert [file.path for file in client.list_artifacts(stopped.info.run_id, "drift")] == ["drift/drift.html"]
    assert states_in(capsys.readouterr().out) == {
        "validate": "Completed", "drift": "Failed", "train": "NotRun", "other": "Completed", "tune": "NotRun",
    }  # fmt: skip

    assert main(["--no-promote", "--accept-drift"]) == 0
    assert states_in(capsys.readouterr().out) == {
        "validate": "Skipped", "drift": "Completed", "train": "Completed", "other": "Skipped", "tune": "Completed",
    }  # fmt: skip
    assert Path("tuned").read_bytes() == Path("new.parquet").read_bytes()
    state, tasks = run_flow(promote=False)  # the next run on this data, also one that resumes
    assert tasks["drift"][1].startswith("this data was accepted in the run tiny · ")
    assert {name for name, _ in tasks.values()} == {"Skipped"}


def test_a_run_that_only_compared_the_data_has_no_results_to_save() -> None:
    from flows.drift import DRIFT
    from flows.pipeline import has_changed
    from flows.stage import StageResult

    results = [StageResult("validate", "Skipped"), StageResult(DRIFT, "Completed"), StageResult("train", "Skipped")]
    assert not has_changed(results)
    for state in ("Completed", "Cached"):
        assert has_changed([*results, StageResult("tune", state)])


def test_every_stage_that_needs_validated_data_waits_for_the_check() -> None:
    from flows.drift import with_drift_check
    from flows.graph import Stage, downstream_of, stage_order

    stages = with_drift_check(stage_order(ROOT))
    names = [stage.name for stage in stages]
    assert names.index("drift") == names.index("validate") + 1
    assert set(downstream_of(stages, "drift")) == set(names) - {"ingest", "validate", "drift"}
    late = [Stage("sft", ()), Stage("evaluate", ("sft",))]  # what a run from sft on consists of
    assert with_drift_check(late) == late
