"""What a person sees at the end of a run: one table on the terminal, the same as an artifact in Prefect."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.stage import Outcome, figures_text

STYLES = {"Completed": "green", "Cached": "cyan", "Skipped": "dim", "Failed": "bold red", "NotRun": "yellow"}
SAMPLES = Path("models/evaluation/samples.png")
DATA_DOCS = Path("data/validated/data_docs/index.html")


def _memory(outcome: Outcome) -> str:
    return f"{outcome.peak_megabytes:,.0f}" if outcome.peak_megabytes else ""


def show_table(outcomes: Sequence[Outcome], verdict: str, console: Console | None = None) -> None:
    """Stages with state, seconds, peak memory of the stage's process and headline figures; then the verdict and where to look."""
    table = Table(title="pipeline", title_justify="left")
    for name, justify in (("stage", "left"), ("state", "left"), ("seconds", "right"), ("peak MB", "right"), ("figures", "left")):
        table.add_column(name, justify=justify, no_wrap=name != "figures")  # type: ignore[arg-type]
    for outcome in outcomes:
        state = f"[{STYLES.get(outcome.state, '')}]{outcome.state}[/]"
        seconds = "" if outcome.state == "NotRun" else f"{outcome.seconds:.1f}"
        table.add_row(outcome.stage, state, seconds, _memory(outcome), escape(figures_text(outcome.figures)))
    ran = [outcome for outcome in outcomes if outcome.state != "NotRun"]
    table.add_section()
    table.add_row(
        "all", "", f"{sum(o.seconds for o in ran):.1f}", _memory(max(ran, key=lambda o: o.peak_megabytes or 0)) if ran else "", ""
    )
    console = console or Console(width=None if os.environ.get("COLUMNS") or Console().is_terminal else 140)
    console.print(table)
    for outcome in outcomes:
        if outcome.error:
            console.print(f"[bold red]{escape(outcome.error)}[/]", highlight=False)
    console.print(f"[bold]{escape(verdict)}[/]", highlight=False)
    for what, where in links():
        console.print(f"{what:<10} {where}", highlight=False, soft_wrap=True)


def links() -> list[tuple[str, str]]:
    """Where to look next: what exists of samples and Data Docs, and the command for the user interfaces."""
    found = [("samples", str(SAMPLES))] if SAMPLES.is_file() else []
    found += [("data docs", str(DATA_DOCS))] if DATA_DOCS.is_file() else []
    return [*found, ("browse", "make ui   (MLflow, Prefect, Data Docs)")]


def markdown(outcomes: Sequence[Outcome], verdict: str, mlflow_run: str | None) -> str:
    """The report of a run as markdown."""
    lines = [f"## {verdict}", "", "| stage | state | seconds | peak MB | figures |", "|---|---|---:|---:|---|"]
    for o in outcomes:
        lines.append(f"| {o.stage} | {o.state} | {o.seconds:.1f} | {_memory(o)} | {figures_text(o.figures, 12)} |")
    for o in outcomes:
        if o.error:
            lines += ["", "```", o.error, "```"]
    lines += ["", *(f"- {what}: `{where}`" for what, where in links())]
    if mlflow_run:
        lines.append(f"- MLflow run: `{mlflow_run}`")
    return "\n".join(lines) + "\n"
