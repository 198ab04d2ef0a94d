"""The report of a run: headline scores first, and links that lead somewhere from where they are read."""

import io
import json
import socket
from pathlib import Path

import pytest
from rich.console import Console

from cm3leon.config import paths
from cm3leon.evaluation.reference import Comparison, spread
from cm3leon.services.environment import SERVER_FILE
from cm3leon.tracking.runs import Run
from cm3leon.utils.processes import identity
from flows.report import Before, markdown, mlflow_page, show_table
from flows.stage import StageResult, metrics_text

SCORES = {"super_resolution_psnr_rgb": 32.4, "clip_score": 0.6, "composition": 0.41, "vqa_accuracy": 0.62}
RESULTS = [StageResult("sft", "Failed", 12.5, error="stage sft failed"), StageResult("evaluate", "Skipped", 1.0, None, SCORES)]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The MLflow run of a pipeline whose outputs can be looked at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for path in (paths.EVALUATION / "samples.png", paths.DATA_DOCS / "index.html", paths.DATA_REPORT, paths.run_file("evaluate")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"run_id": "e1", "experiment_id": "1"}))
    return Run(None, "p1", "1")


def announce(process: str) -> None:
    SERVER_FILE.parent.mkdir()
    servers = {"MLflow": "http://127.0.0.1:5001", "Prefect": "http://127.0.0.1:4200", "Data Docs": "http://127.0.0.1:8000"}
    SERVER_FILE.write_text(json.dumps({"process": process, "servers": servers}))


def test_an_artifact_has_a_page_of_its_own(run: Run) -> None:
    assert mlflow_page(run) is None
    announce(identity())
    assert mlflow_page(run) == "http://127.0.0.1:5001/#/experiments/1/runs/p1?workflowType=machine_learning"
    artifact = mlflow_page(run, "drift/drift.html")
    assert artifact == "http://127.0.0.1:5001/#/experiments/1/runs/p1/artifacts/drift/drift.html?workflowType=machine_learning"


def test_headline_scores_come_before_all_others() -> None:
    assert metrics_text(SCORES, 3) == "composition 0.41, vqa_accuracy 0.62, clip_score 0.6"
    assert metrics_text({"rows": 12.0, "parameters": 20_780_000.0}) == "rows 12, parameters 20,780,000"


def test_links_lead_to_the_pages_of_servers_that_run(run: Run) -> None:
    announce(identity())
    text = markdown(RESULTS, "done", run, Before())
    assert "[MLflow run](http://127.0.0.1:5001/#/experiments/1/runs/p1?workflowType=machine_learning)" in text
    assert "[samples](http://127.0.0.1:5001/#/experiments/1/runs/e1/artifacts)" in text
    assert "[data docs](http://127.0.0.1:8000/index.html)" in text
    assert "[data report](http://127.0.0.1:8000/data_report.html)" in text


def test_links_lead_to_files_where_no_server_runs(run: Run, tmp_path: Path) -> None:
    announce(f"{socket.gethostname()}:1:0")  # process 1 has another start
    text = markdown(RESULTS, "done", run, Before())
    assert f"[samples]({tmp_path.as_uri()}/models/evaluation/samples.png)" in text
    assert f"[data docs]({tmp_path.as_uri()}/models/runs/validate/data_docs/index.html)" in text
    assert f"[data report]({tmp_path.as_uri()}/models/runs/validate/data_docs/data_report.html)" in text
    assert "http://" not in text


def test_links_lead_to_the_mlflow_server_of_the_user(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org/")
    assert "[MLflow run](https://mlflow.example.org/#/experiments/1/runs/p1?workflowType=machine_learning)" in markdown(
        RESULTS, "done", run, Before()
    )


def test_scores_stand_above_the_stages_and_a_failed_stage_has_its_seconds(run: Run) -> None:
    text = markdown(RESULTS, "done", run, Before())
    assert text.index("**composition 0.41, vqa_accuracy 0.62") < text.index("| stage |")
    assert "| sft | Failed | 12.5 |" in text


FIVE = spread("composition", [0.68, 0.70, 0.71, 0.72, 0.74])
BESIDE = Before(
    {"sft": 11.5}, Comparison(5, {"composition": (0.41, FIVE), "vqa_accuracy": (0.70, FIVE)}, {"sft": 600.0, "evaluate": 300.0})
)


def printed(before: Before, width: int) -> str:
    written = io.StringIO()
    show_table(RESULTS, "done", Run(), before, Console(file=written, width=width))
    return written.getvalue()


@pytest.mark.parametrize("width", [80, 100, 140])
def test_seconds_stand_beside_those_of_the_last_run_here_or_of_fresh_runs(run: Run, width: int) -> None:
    cells = {row[1]: row for row in ([cell.strip() for cell in line.split("│")] for line in printed(BESIDE, width).splitlines()) if row[1:]}
    assert cells["sft"][3:5] == ["12.5", "11.5"] and cells["evaluate"][3:5] == ["1.0", "~300.0"] and cells["all"][4] == "~311.5"
    assert "~ not run here before: median of the fresh runs" in printed(BESIDE, width)
    assert "~" not in printed(Before({"sft": 11.5}), width)


@pytest.mark.parametrize("width", [100, 140])
def test_a_score_below_all_fresh_runs_is_marked(run: Run, width: int) -> None:
    lines = printed(BESIDE, width).splitlines()
    [bad] = [line for line in lines if line.startswith("│ composition ")]
    [good] = [line for line in lines if line.startswith("│ vqa_accuracy ")]
    assert all(text in bad for text in ("0.410", "0.710", "0.680–0.740", "worse than all"))
    assert "0.700" in good and "worse" not in good
    assert "worst–best" not in printed(Before(), width)


def test_the_artifact_has_the_same(run: Run) -> None:
    text = markdown(RESULTS, "done", run, BESIDE)
    assert "| sft | Failed | 12.5 | 11.5 |" in text and "| evaluate | Skipped | 1.0 | ~300.0 |" in text
    assert "| composition | 0.410 | 0.710 | 0.680–0.740 | **worse than all** |" in text
    assert "| vqa_accuracy | 0.700 | 0.710 | 0.680–0.740 |  |" in text and "by chance one score of 6" in text
    assert "worst–best" not in markdown(RESULTS, "done", run, Before())
