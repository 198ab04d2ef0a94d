"""One DVC stage as a Prefect task: run it if it is out of date, stream its output into the run's log, say how it ended."""

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
from prefect.states import Completed

from cm3leon.services.child import run_command
from cm3leon.services.environment import child_path
from cm3leon.stages.common import METRICS

ERROR_LINES = 15
CHATTER = re.compile(
    r"To track the changes|To enable auto staging|\tgit add |\tdvc config core.autostage|Use `dvc push`|Data and pipelines"
)
"""Lines of DVC that say nothing about the stage."""


@dataclass
class Outcome:
    """How a stage ended. ``state``: Completed, Skipped (up to date), Cached (restored without running), Failed or NotRun."""

    stage: str
    state: str = "NotRun"
    seconds: float = 0.0
    peak_megabytes: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    error: str | None = None


class StageFailedError(RuntimeError):
    """A stage's command failed; the message ends with its own last lines."""


def dvc_command(stage: str) -> list[str]:
    """``dvc --wait-for-lock repro --single-item STAGE`` with this interpreter's DVC."""
    return [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]


def run_stage(stage: str, log: Callable[[str], None]) -> Outcome:
    """Bring one stage up to date; what it depends on must be.

    Raises:
        StageFailedError: with the stage's own last lines.
    """
    outcome, start = Outcome(stage, "Completed"), time.monotonic()

    def read(line: str) -> None:
        if line.startswith(METRICS):
            _read_figures(line, outcome)
        elif line == f"Stage '{stage}' didn't change, skipping":
            outcome.state = "Skipped"
        elif line.startswith(f"Stage '{stage}' is cached"):
            outcome.state = "Cached"
        if not CHATTER.match(line):
            log(line)

    finished = run_command(dvc_command(stage), read, {**os.environ, "PATH": child_path()})
    outcome.seconds = time.monotonic() - start
    if finished.status != 0:
        raise StageFailedError(f"stage {stage} failed:\n{last_words(finished.tail, finished.status)}")
    return outcome


def _read_figures(line: str, outcome: Outcome) -> None:
    try:
        figures = {str(name): float(value) for name, value in json.loads(line.removeprefix(METRICS)).items()}
    except (ValueError, TypeError, AttributeError):
        return
    figures.pop("seconds", None)
    outcome.peak_megabytes = figures.pop("peak_megabytes", None)
    outcome.figures = figures


def last_words(tail: list[str], status: int) -> str:
    """The end of a failed command's output: from its own ``error:`` line where there is one, else the last lines."""
    starts = [number for number, line in enumerate(tail) if line.startswith("error: ")]
    lines = tail[starts[-1] :] if starts else tail
    return "\n".join(lines[-ERROR_LINES:]) or f"no output, exit status {status}"


@task(name="stage", task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def stage_task(name: str) -> State:
    """Run one stage; ends Completed, or with the name Skipped or Cached where its command did not run."""
    outcome = run_stage(name, get_run_logger().info)
    return Completed(name=outcome.state, message=figures_text(outcome.figures), data=outcome)


def figures_text(figures: dict[str, float], limit: int = 4) -> str:
    """The first few figures, short: "psnr 28.4, codebook_used 511"."""
    return ", ".join(f"{name} {value:,.4g}" for name, value in list(figures.items())[:limit])
