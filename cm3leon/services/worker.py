"""A Prefect worker that ends when it is told to: python -m cm3leon.services.worker POOL

Told to end, Prefect's worker and its flow runs first send what they still have to tell the server. If that is gone, they try again for
seconds with each event and each line of the log, minutes in all. Here they have :data:`~cm3leon.utils.processes.STOP_SECONDS`, in which a
training writes its checkpoint, and are killed then.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from cm3leon.services.automations import mark_stuck_runs
from cm3leon.services.child import run_command
from cm3leon.services.environment import ServerError, child_path, use_environment
from cm3leon.tracking.store import warn


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(pool: str) -> int:
    """Work on the runs of a pool until SIGTERM or Ctrl-C; returns the exit status."""
    use_environment()
    os.environ["PATH"] = child_path()  # for the python of the deployments' first step
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        mark_stuck_runs()
    except ServerError as error:
        warn(f"{error}; runs whose process was killed will count as running")
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
    with suppress(KeyboardInterrupt):
        return run_command(command, lambda line: print(line, flush=True)).status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
