"""One DVC stage as a Prefect task: run it if it is out of date, stream its output into the run's log, return its metrics."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from cm3leon.config import paths
from cm3leon.services.child import run_command
from cm3leon.services.environment import child_path
from cm3leon.stages.common import METRICS
from flows.cache import remove_damaged

ERROR_LINES = 15
"""Most lines of a failed command's output that its error repeats."""
CHATTER = re.compile(
    r"To track the changes|To enable auto staging|\tgit add |\tdvc config core.autostage|Use `dvc push`|Data and pipelines"
)
"""Lines of DVC that say nothing about the stage."""
HEADLINE = ("composition", "vqa_accuracy", "cider", "fd_encoder", "clip_score")
"""Scores that stand before all others, in this order."""
KILLED, EXIT_KILLED = (-9, 137), re.compile(r"exited with (-9|137)\b")
"""Exit status of a command that got SIGKILL, itself and through a shell, and how DVC reports it."""
OUT_OF_MEMORY = (
    "killed (SIGKILL), probably because memory ran out; `cm3leon plan` says what the stage needs: "
    "lower its batch_size or micro_batch_size, or free memory"
)


END_SECONDS = 600.0
"""From SIGTERM to SIGKILL of a stage: the step and the checkpoint of a large model take minutes."""


@dataclass
class StageResult:
    """How a stage ended.

    Attributes:
        stage: its name.
        state: Completed, Skipped (up to date), Cached (outputs restored without running the command), Failed or NotRun.
        seconds: wall-clock time, DVC's own included.
        peak_megabytes: largest resident memory of the stage's process; None if it did not run.
        metrics: the headline metrics of the run that made the stage's outputs.
        error: the last lines of a failed command.
    """

    stage: str
    state: str = "NotRun"
    seconds: float = 0.0
    peak_megabytes: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None


def dvc_command(stage: str) -> list[str]:
    """``dvc --wait-for-lock repro --single-item STAGE`` with this interpreter's DVC."""
    return [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]


def run_stage(stage: str, log: Callable[[str], None]) -> StageResult:
    """Bring one stage up to date; the stages that it depends on must be up to date."""
    result = StageResult(stage, "Completed")
    start = time.monotonic()

    def read(line: str) -> None:
        # DVC tells by its output only whether it ran the command.
        if line.startswith(METRICS):
            _read_metrics(line, result)
        elif line in (f"Stage '{stage}' didn't change, skipping", f"'{stage}' didn't change, skipping"):  # the latter of a .dvc file
            result.state = "Skipped"
        elif line.startswith(f"Stage '{stage}' is cached"):
            result.state = "Cached"
        if not CHATTER.match(line):
            log(line)

    finished = run_command(dvc_command(stage), read, {**os.environ, "PATH": child_path()}, END_SECONDS)
    result.seconds = time.monotonic() - start
    if finished.status != 0:
        result.state = "Failed"
        result.error = f"stage {stage} failed:\n{error_lines(finished.tail, finished.status)}"
        return result
    if result.state == "Cached" and (damaged := remove_damaged(stage)):
        log(f"damaged in DVC's cache, made anew: {', '.join(damaged)}")
        return run_stage(stage, log)
    if result.state != "Completed" and (kept := paths.metrics_file(stage)).is_file():
        result.metrics = json.loads(kept.read_text())
    return result


def _read_metrics(line: str, result: StageResult) -> None:
    try:
        metrics = {str(name): float(value) for name, value in json.loads(line.removeprefix(METRICS)).items()}
    except (ValueError, TypeError, AttributeError):  # a line of the stage's own that only starts alike
        return
    metrics.pop("seconds", None)
    result.peak_megabytes = metrics.pop("peak_megabytes", None)
    result.metrics = metrics


def error_lines(tail: list[str], status: int) -> str:
    """The end of a failed command's output: from its own ``error:`` line if there is one, else the last lines; a hint after SIGKILL."""
    starts = [number for number, line in enumerate(tail) if line.startswith("error: ")]
    lines = (tail[starts[-1] :] if starts else tail)[-ERROR_LINES:]
    if status in KILLED or any(EXIT_KILLED.search(line) for line in lines):
        lines = [*lines, OUT_OF_MEMORY]
    return "\n".join(lines) or f"no output, exit status {status}"


@task(name="stage", task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def stage_task(name: str) -> State:
    """Run one stage; ends in the state Completed, or in one named Skipped or Cached if its command did not run."""
    result = run_stage(name, get_run_logger().info)
    # In a list, because Prefect takes equal texts in the results of two tasks for a dependency, and looks into what is not nested.
    if result.error:
        return Failed(message=result.error, data=[result])
    return Completed(name=result.state, message=metrics_text(result.metrics), data=[result])


def metrics_text(metrics: dict[str, float], limit: int = 4) -> str:
    """The first ``limit`` metrics, :data:`HEADLINE` before others: "composition 0.41, vqa_accuracy 0.62"."""
    ordered = {name: metrics[name] for name in HEADLINE if name in metrics} | metrics
    shown = [(name, float(value)) for name, value in list(ordered.items())[:limit]]
    return ", ".join(f"{name} {value:{',.0f' if value.is_integer() else ',.4g'}}" for name, value in shown)
