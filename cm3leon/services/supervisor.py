"""The supervisor of ``cm3leon up``: starts the parts one after the other, starts again what ends or stops answering, until SIGTERM.

python -m cm3leon.services.supervisor
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType

from cm3leon.services.leftovers import SERVICES, write_record
from cm3leon.services.local import answers
from cm3leon.services.stack import LOGS, STATE, Part, parts, read_state, write_state
from cm3leon.utils import telemetry
from cm3leon.utils.processes import identity, stop_tree

ANSWER_SECONDS = 90.0
"""How long a part may take to answer after its start."""
CHECK_SECONDS, FAILURES = 5.0, 6
"""A part that does not answer this many checks in a row, so far apart, is started again."""
PAUSE_SECONDS, LONGEST_PAUSE = 1.0, 60.0
"""Before a part is started again; doubled each time, until it has answered for a while."""
STOP_SECONDS = 15.0
"""From SIGTERM to SIGKILL of a part: a worker whose server is gone does not end by itself."""


class Stopped(BaseException):
    """SIGTERM."""


def note(line: str) -> None:
    """Write a line with the time into the supervisor's log; on a full disk it is lost, but the parts go on."""
    with contextlib.suppress(OSError):
        print(f"{time.strftime('%F %T')} {line}", flush=True)


class Kept:
    """A part that is kept running."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.process: subprocess.Popen[bytes] | None = None
        self.record: Path | None = None
        self.failures, self.pause = 0, PAUSE_SECONDS
        self.next_check = self.next_start = 0.0

    def start(self) -> None:
        """Start the process; its log continues."""
        with (LOGS / f"{self.part.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.part.arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **self.part.environment},
            )  # fmt: skip
        with contextlib.suppress(OSError):  # of a full disk
            self.record = write_record(SERVICES, identity(self.process.pid), identity())
        self.failures, self.next_check = 0, time.monotonic() + ANSWER_SECONDS
        note(f"{self.part.name}: started, process {self.process.pid}")

    def wait(self) -> None:
        """Wait until the part answers.

        Raises:
            TimeoutError: if it ends, or does not answer in time.
        """
        end = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < end and self.process and self.process.poll() is None:
            if answers(self.part.health):
                self.next_check = time.monotonic() + CHECK_SECONDS
                return
            time.sleep(0.2)
        raise TimeoutError(f"{self.part.name} does not answer at {self.part.health}")

    def check(self) -> None:
        """Start the part again if it has ended or stopped answering."""
        now = time.monotonic()
        if self.process is None:
            if now >= self.next_start:
                try:
                    self.start()
                except OSError as error:  # a full disk, no memory
                    self._restart_later(f"cannot be started ({error})")
        elif self.process.poll() is not None:
            self._restart_later(f"ended with status {self.process.returncode}")
        elif now >= self.next_check:
            self.next_check = now + CHECK_SECONDS
            if answers(self.part.health):
                self.failures, self.pause = 0, PAUSE_SECONDS
                return
            if self.part.needs and not answers(self.part.needs):
                self.failures, self.next_check = 0, now + ANSWER_SECONDS  # once that answers, the part has as long as after its start
                return
            self.failures += 1
            if self.failures >= FAILURES:
                self.stop()
                self._restart_later("does not answer")

    def _restart_later(self, why: str) -> None:
        note(f"{self.part.name}: {why}; starts again in {self.pause:.0f} s")
        self._forget()
        self.next_start = time.monotonic() + self.pause
        self.pause = min(2 * self.pause, LONGEST_PAUSE)

    def stop(self) -> None:
        """Stop the process and all that it started."""
        if self.process:
            stop_tree(self.process.pid, STOP_SECONDS)
            self.process.wait()
            self._forget()

    def _forget(self) -> None:
        """The process has ended."""
        if self.record:
            with contextlib.suppress(OSError):
                self.record.unlink()
        self.process, self.record = None, None


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def main() -> int:
    """Keep the parts running; returns the exit status."""
    telemetry.turn_off()
    signal.signal(signal.SIGTERM, _stop)
    state = read_state()
    if state is None:
        print("there is nothing to supervise; run: cm3leon up", file=sys.stderr)
        return 2
    kept = [Kept(part) for part in parts(state)]
    try:
        for item in kept:
            item.start()
            item.wait()
        write_state(replace(state, supervisor=identity()))
        while True:
            for item in kept:
                item.check()
            time.sleep(0.5)
    except Stopped:
        return 0
    except TimeoutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for item in reversed(kept):
            item.stop()
        with contextlib.suppress(OSError):
            STATE.unlink()


if __name__ == "__main__":
    sys.exit(main())
