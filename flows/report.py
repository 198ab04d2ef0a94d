"""The report of a pipeline run: a table on the terminal, and the same as markdown for Prefect."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cm3leon.config import paths
from cm3leon.evaluation.reference import Comparison, Spread
from cm3leon.evaluation.results_page import three_digits
from cm3leon.services.environment import ui_servers
from cm3leon.tracking.runs import Run
from cm3leon.tracking.store import tracking_uri, without_credentials
from cm3leon.tracking.view import run_page
from flows.stage import StageResult, metrics_text

STYLES = {"Completed": "green", "Cached": "cyan", "Skipped": "dim", "Failed": "bold red", "NotRun": "yellow"}
SAMPLES = paths.EVALUATION / "samples.png"
RESULTS_PAGE = "docs/results.md"
DATA_PAGES = {"data report": paths.DATA_REPORT, "data docs": paths.DATA_DOCS / "index.html"}


@dataclass(frozen=True)
class Before:
    """What a run is shown beside.

    Attributes:
        seconds: stage -> seconds of its last run here.
        reference: the fresh runs of the same parameters.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    reference: Comparison = field(default_factory=Comparison)

    def of(self, *stages: str) -> str:
        """Seconds that stages took together: in their last run here, else "~" and the median of the fresh runs, else nothing."""
        known = {**self.reference.seconds, **self.seconds}
        found = [stage for stage in stages if stage in known]
        mark = "" if set(found) <= set(self.seconds) else "~"
        return f"{mark}{sum(known[stage] for stage in found):.1f}" if found else ""

    def note(self, *stages: str) -> str:
        """What "~" means, if it is shown for one of the stages."""
        shown = self.of(*stages).startswith("~")
        return f"~ not run here before: median of the fresh runs that were timed ({RESULTS_PAGE})" if shown else ""

    def scores(self) -> list[tuple[str, str, str, str, str]]:
        """Rows of the scores: name, of this run, median and range of the fresh runs, and whether this run is worse than all of them."""
        return [(name, *_beside(score, found)) for name, (score, found) in self.reference.scores.items()]

    def chance(self) -> str:
        """How often a run that is as good as the others is worse than all of them."""
        number = self.reference.count
        return f"{number} fresh runs of the same parameters ({RESULTS_PAGE}); by chance one score of {number + 1} is worse than all of them"


def _beside(score: float, found: Spread) -> tuple[str, str, str, str]:
    mark = "worse than all" if found.is_worse(score) else ""
    return three_digits(score), three_digits(found.median), f"{three_digits(found.worst)}–{three_digits(found.best)}", mark


def _memory(result: StageResult) -> str:
    return f"{result.peak_megabytes:,.0f}" if result.peak_megabytes else ""


def _seconds(result: StageResult) -> str:
    return "" if result.state == "NotRun" else f"{result.seconds:.1f}"


def show_table(results: Sequence[StageResult], verdict: str, run: Run, before: Before, console: Console | None = None) -> None:
    """Print the stages with their seconds now and before, the scores beside those of fresh runs, errors, the verdict and links."""
    console = console or Console(width=None if os.environ.get("COLUMNS") or Console().is_terminal else 140)
    console.print(_stage_table(results, before))
    if before.reference.scores:
        console.print(_score_table(before))
    for result in results:
        if result.error:
            console.print(f"[bold red]{escape(result.error)}[/]", highlight=False)
    console.print(f"[bold]{escape(verdict)}[/]", highlight=False)
    for what, where in links(run, str):
        console.print(f"{what:<11} {where}", highlight=False, soft_wrap=True)
    if not ui_servers():
        console.print(f"{'browse':<11} make ui   (MLflow, Prefect, Data Docs)", highlight=False)


def _stage_table(results: Sequence[StageResult], before: Before) -> Table:
    table = _table("pipeline", ("stage", "state"), ("seconds", "before", "peak MB"), "metrics")
    stages = [result.stage for result in results]
    table.caption = before.note(*stages) or None
    for result in results:
        state = f"[{STYLES.get(result.state, '')}]{result.state}[/]"
        cells = (_seconds(result), before.of(result.stage), _memory(result), escape(metrics_text(result.metrics)))
        table.add_row(result.stage, state, *cells)
    ran = [result for result in results if result.state != "NotRun"]
    most_memory = _memory(max(ran, key=lambda r: r.peak_megabytes or 0)) if ran else ""
    table.add_section()
    table.add_row("all", "", f"{sum(r.seconds for r in ran):.1f}", before.of(*stages), most_memory, "")
    return table


def _score_table(before: Before) -> Table:
    table = _table("scores", ("score",), ("this run", "median", "worst–best"), "")
    table.caption = before.chance()
    for name, score, median, extent, mark in before.scores():
        table.add_row(name, f"[bold red]{score}[/]" if mark else score, median, extent, f"[bold red]{mark}[/]" if mark else "")
    return table


def _table(title: str, names: Sequence[str], numbers: Sequence[str], rest: str) -> Table:
    """An empty table; only cells of the last column may be broken into lines."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(rest)
    return table


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
    return without_credentials(uri).rstrip("/") if uri.startswith("http") else ui_servers().get("MLflow")


def mlflow_page(run: Run, artifact: str = "") -> str | None:
    """The page of a run, or of its artifact, in MLflow; None if no server is up, or the run is not tracked."""
    mlflow = _mlflow()
    return f"{mlflow}/{run_page(str(run.experiment_id), run.run_id, artifact)}" if mlflow and run.run_id else None


def markdown(results: Sequence[StageResult], verdict: str, run: Run, before: Before, saved: str = "") -> str:
    """The report as markdown: verdict, headline scores, links, stages, and scores beside those of the fresh runs.

    Args:
        saved: name of the experiment of DVC that holds what the run has changed.
    """
    scores = next((r.metrics for r in results if r.stage == "evaluate"), {})
    lines = [f"## {verdict}", ""]
    lines += [f"**{metrics_text(scores, 5)}**", ""] if scores else []
    lines += [f"- [{what}]({where})" for what, where in links(run, lambda path: path.absolute().as_uri())]
    lines += [f"- MLflow run `{run.run_id}`"] if run.run_id else []
    lines += [f"- to take these outputs over: `dvc exp apply {saved}`"] if saved else []
    lines += ["", "| stage | state | seconds | before | peak MB | metrics |", "|---|---|---:|---:|---:|---|"]
    for r in results:
        lines.append(f"| {r.stage} | {r.state} | {_seconds(r)} | {before.of(r.stage)} | {_memory(r)} | {metrics_text(r.metrics, 3)} |")
    if note := before.note(*(r.stage for r in results)):
        lines += ["", note]
    if rows := before.scores():
        lines += ["", "| score | this run | median | worst–best | |", "|---|---:|---:|---:|---|"]
        lines += [f"| {' | '.join(cells)} | {f'**{mark}**' if mark else ''} |" for *cells, mark in rows]
        lines += ["", before.chance()]
    for r in results:
        if r.error:
            lines += ["", "```", r.error, "```"]
    return "\n".join(lines) + "\n"
