"""The report of a pipeline run: a table on the terminal, and the same as markdown for Prefect."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cm3leon.config import paths
from cm3leon.services.environment import ui_servers
from cm3leon.tracking.runs import Run
from cm3leon.tracking.store import tracking_uri
from cm3leon.tracking.view import run_page
from flows.stage import StageResult, metrics_text

STYLES = {"Completed": "green", "Cached": "cyan", "Skipped": "dim", "Failed": "bold red", "NotRun": "yellow"}
SAMPLES = paths.EVALUATION / "samples.png"
DATA_PAGES = {"data report": paths.DATA_REPORT, "data docs": paths.DATA_DOCS / "index.html"}


def _memory(result: StageResult) -> str:
    return f"{result.peak_megabytes:,.0f}" if result.peak_megabytes else ""


def _seconds(result: StageResult) -> str:
    return "" if result.state == "NotRun" else f"{result.seconds:.1f}"


def show_table(results: Sequence[StageResult], verdict: str, run: Run, console: Console | None = None) -> None:
    """Print stages with state, seconds, peak memory of the stage's process and headline metrics; then errors, the verdict and links."""
    table = Table(title="pipeline", title_justify="left")
    for name, justify in (("stage", "left"), ("state", "left"), ("seconds", "right"), ("peak MB", "right"), ("metrics", "left")):
        table.add_column(name, justify=justify, no_wrap=name != "metrics")  # type: ignore[arg-type]
    for result in results:
        state = f"[{STYLES.get(result.state, '')}]{result.state}[/]"
        table.add_row(result.stage, state, _seconds(result), _memory(result), escape(metrics_text(result.metrics)))
    ran = [result for result in results if result.state != "NotRun"]
    most_memory = _memory(max(ran, key=lambda r: r.peak_megabytes or 0)) if ran else ""
    table.add_section()
    table.add_row("all", "", f"{sum(r.seconds for r in ran):.1f}", most_memory, "")
    console = console or Console(width=None if os.environ.get("COLUMNS") or Console().is_terminal else 140)
    console.print(table)
    for result in results:
        if result.error:
            console.print(f"[bold red]{escape(result.error)}[/]", highlight=False)
    console.print(f"[bold]{escape(verdict)}[/]", highlight=False)
    for what, where in links(run, str):
        console.print(f"{what:<11} {where}", highlight=False, soft_wrap=True)
    if not ui_servers():
        console.print(f"{'browse':<11} make ui   (MLflow, Prefect, Data Docs)", highlight=False)


def links(run: Run, local: Callable[[Path], str]) -> list[tuple[str, str]]:
    """Where to look next, as (what, address): pages of servers that run, else files.

    Args:
        run: the MLflow run of the pipeline.
        local: how the address of a file is written.
    """
    servers, mlflow = ui_servers(), _mlflow()
    found = []
    if own_page := mlflow_page(run):
        found.append(("MLflow run", own_page))
    if SAMPLES.is_file():
        evaluated = json.loads(run_file.read_text()) if (run_file := paths.run_file("evaluate")).is_file() else {}
        page = f"{mlflow}/#/experiments/{evaluated.get('experiment_id')}/runs/{evaluated.get('run_id')}/artifacts"
        found.append(("samples", page if mlflow and evaluated.get("run_id") else local(SAMPLES)))
    for what, file in DATA_PAGES.items():
        if file.is_file():
            found.append((what, f"{servers['Data Docs']}/{file.name}" if "Data Docs" in servers else local(file)))
    return found


def _mlflow() -> str | None:
    """The address of MLflow's pages; None if no server is up."""
    uri = tracking_uri()
    return uri.rstrip("/") if uri.startswith("http") else ui_servers().get("MLflow")


def mlflow_page(run: Run, artifact: str = "") -> str | None:
    """The page of a run, or of its artifact, in MLflow; None if no server is up, or the run is not tracked."""
    mlflow = _mlflow()
    return f"{mlflow}/{run_page(str(run.experiment_id), run.run_id, artifact)}" if mlflow and run.run_id else None


def markdown(results: Sequence[StageResult], verdict: str, run: Run, saved: str = "") -> str:
    """The report as markdown: verdict, headline scores, links, stages.

    Args:
        saved: name of the experiment of DVC that holds what the run has changed.
    """
    scores = next((r.metrics for r in results if r.stage == "evaluate"), {})
    lines = [f"## {verdict}", ""]
    lines += [f"**{metrics_text(scores, 5)}**", ""] if scores else []
    lines += [f"- [{what}]({where})" for what, where in links(run, lambda path: path.absolute().as_uri())]
    lines += [f"- MLflow run `{run.run_id}`"] if run.run_id else []
    lines += [f"- to take these outputs over: `dvc exp apply {saved}`"] if saved else []
    lines += ["", "| stage | state | seconds | peak MB | metrics |", "|---|---|---:|---:|---|"]
    lines += [f"| {r.stage} | {r.state} | {_seconds(r)} | {_memory(r)} | {metrics_text(r.metrics, 3)} |" for r in results]
    for r in results:
        if r.error:
            lines += ["", "```", r.error, "```"]
    return "\n".join(lines) + "\n"
