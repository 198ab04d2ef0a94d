"""The report of a pipeline run: a table on the terminal, and the same as markdown for Prefect."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.stage import StageResult, metrics_text

STYLES = {"Completed": "green", "Cached": "cyan", "Skipped": "dim", "Failed": "bold red", "NotRun": "yellow"}
SAMPLES = Path("models/evaluation/samples.png")
DATA_DOCS = Path("data/validated/data_docs/index.html")


def _memory(result: StageResult) -> str:
    return f"{result.peak_megabytes:,.0f}" if result.peak_megabytes else ""


def show_table(results: Sequence[StageResult], verdict: str, console: Console | None = None) -> None:
    """Print stages with state, seconds, peak memory of the stage's process and headline metrics; then errors, the verdict and links."""
    table = Table(title="pipeline", title_justify="left")
    for name, justify in (("stage", "left"), ("state", "left"), ("seconds", "right"), ("peak MB", "right"), ("metrics", "left")):
        table.add_column(name, justify=justify, no_wrap=name != "metrics")  # type: ignore[arg-type]
    for result in results:
        state = f"[{STYLES.get(result.state, '')}]{result.state}[/]"
        seconds = "" if result.state == "NotRun" else f"{result.seconds:.1f}"
        table.add_row(result.stage, state, seconds, _memory(result), escape(metrics_text(result.metrics)))
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
    for what, where in links():
        console.print(f"{what:<10} {where}", highlight=False, soft_wrap=True)


def links() -> list[tuple[str, str]]:
    """Where to look next: samples and Data Docs, if there are any, and the command that starts the user interfaces."""
    found = [("samples", str(SAMPLES))] if SAMPLES.is_file() else []
    found += [("data docs", str(DATA_DOCS))] if DATA_DOCS.is_file() else []
    return [*found, ("browse", "make ui   (MLflow, Prefect, Data Docs)")]


def markdown(results: Sequence[StageResult], verdict: str, mlflow_run: str | None) -> str:
    """The report as markdown."""
    lines = [f"## {verdict}", "", "| stage | state | seconds | peak MB | metrics |", "|---|---|---:|---:|---|"]
    lines += [f"| {r.stage} | {r.state} | {r.seconds:.1f} | {_memory(r)} | {metrics_text(r.metrics, 12)} |" for r in results]
    for r in results:
        if r.error:
            lines += ["", "```", r.error, "```"]
    lines += ["", *(f"- {what}: `{where}`" for what, where in links())]
    if mlflow_run:
        lines.append(f"- MLflow run: `{mlflow_run}`")
    return "\n".join(lines) + "\n"
