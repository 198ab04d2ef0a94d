"""What Prefect, DVC and the registry add to the stages' own time: python benchmarks/orchestration.py LOG

LOG is what ``make run`` has printed. A stage's own time is from the start of its command until DVC records its outputs; the rest of the
flow run, from its first to its last line, is orchestration: the graph, hashes of inputs and outputs, registration, gate and promotion.
"""

from __future__ import annotations

import argparse
import re
from datetime import datetime, timedelta
from pathlib import Path

LINE = re.compile(r"^(\d\d:\d\d:\d\d\.\d{3}) \| \w+ +\| (?:Flow|Task) run '([^']+)' - (.*)$", re.MULTILINE)
START, END = "> ", "Updating lock file"
DAY = timedelta(days=1)


def seconds_of(log: str) -> tuple[float, dict[str, float]]:
    """Seconds of the flow run, and of the commands of the stages that ran.

    Raises:
        ValueError: if the log is not of a whole run.
    """
    lines = [(datetime.strptime(time, "%H:%M:%S.%f"), task, text) for time, task, text in LINE.findall(log)]  # noqa: DTZ007 - differences
    if not lines or "Finished in state" not in lines[-1][2]:
        raise ValueError("this is not what a whole run has printed")
    started: dict[str, datetime] = {}
    seconds: dict[str, float] = {}
    for time, task, text in lines:
        if text.startswith(START):
            started[task] = time
        elif text.startswith(END) and task in started:  # not so of a stage that DVC's cache restored
            seconds[task] = _between(started[task], time)
    return _between(lines[0][0], lines[-1][0]), seconds


def _between(start: datetime, end: datetime) -> float:
    """Seconds; lines have no date."""
    return ((end - start) % DAY).total_seconds()


def main() -> None:
    """Print both times and the share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="output of make run")
    whole, stages = seconds_of(parser.parse_args().log.read_text())
    own = sum(stages.values())
    print(f"{len(stages)} stages {own:.0f} s, orchestration {whole - own:.0f} s: {(whole - own) / own:.1%} of the stages")


if __name__ == "__main__":
    main()
