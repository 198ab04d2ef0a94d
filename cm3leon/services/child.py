"""Runs a command as a child of the flow: its output lines go to a callback as they are written, and it never outlives the flow.

The child stays in the flow's process group, so that a signal to the group reaches it too. A flow that is killed can stop nothing, so a
stage watches the flow and ends with it (:func:`end_with_owner`). If standard error is a terminal, the child gets
a pseudo-terminal, which is copied to ours, so that its progress bars show; else both streams are read as lines.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from cm3leon.services.leftovers import PROCESSES, owned, write_record
from cm3leon.utils.processes import STOP_SECONDS, identity, stop_tree

TAIL_LINES = 40
"""Last lines of output that are kept for an error message."""

OWNER = "CM3LEON_OWNER_PID"
"""Variable with the id of the process that has started a command, and with which the command is to end."""
WATCH_SECONDS = 1.0

CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07]*\x07")
"""ANSI control sequences (CSI and OSC), which are no text."""


@dataclass(frozen=True)
class Finished:
    """Exit status of a command, and the last lines of both its streams, in the order read."""

    status: int
    tail: list[str]


def run_command(
    command: Sequence[str],
    on_line: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
    end_seconds: float = STOP_SECONDS,
) -> Finished:
    """Run ``command``; every line of standard output, and of standard error if that is not a terminal, goes to ``on_line``.

    If this process is interrupted, the child and its descendants get SIGTERM, and SIGKILL after ``end_seconds`` (:func:`stop_tree`). If it
    is killed, the next run ends them.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    terminal = _Terminal(tail) if sys.stderr.isatty() else None
    stderr = terminal.slave if terminal else subprocess.STDOUT
    variables = {**(os.environ if environment is None else environment), OWNER: str(os.getpid())}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, env=variables, text=True, errors="replace", bufsize=1
    )
    with owned(PROCESSES, identity(process.pid)):
        try:
            if terminal:
                terminal.start()
            assert process.stdout is not None
            for line in process.stdout:
                if line := line.rstrip():
                    tail.append(line)
                    on_line(line)
            status = process.wait()
        finally:
            if process.poll() is None:
                stop_tree(process.pid, end_seconds)
                process.wait()
            if terminal:
                terminal.close()
    return Finished(status, list(tail))


def end_with_owner() -> None:
    """Send this process SIGTERM as soon as the process that :data:`OWNER` names has ended; do nothing without that variable.

    Between the two are DVC and a shell, which neither notice the end of their parent nor pass a signal on. If this process still writes a
    checkpoint when they and its owner are gone, only its own record names it to the next run.
    """
    if pid := os.environ.get(OWNER):
        record = write_record(PROCESSES, identity(), identity(int(pid)))
        atexit.register(record.unlink, missing_ok=True)
        threading.Thread(target=_watch, args=[int(pid)], name="owner", daemon=True).start()


def _watch(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        owner = psutil.Process(pid)
        while owner.is_running() and owner.status() != psutil.STATUS_ZOMBIE:
            time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


class _Terminal:
    """A pseudo-terminal for the child's standard error: copied to ours unchanged, its last lines kept as text."""

    def __init__(self, tail: deque[str]) -> None:
        import fcntl
        import pty
        import termios

        self.tail = tail
        self.master, self.slave = pty.openpty()
        with contextlib.suppress(OSError):
            size = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
            fcntl.ioctl(self.slave, termios.TIOCSWINSZ, size)
        self.thread = threading.Thread(target=self._copy, daemon=True)

    def start(self) -> None:
        os.close(self.slave)
        self.thread.start()

    def _copy(self) -> None:
        rest = ""
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # Linux: EIO once the last writer has closed
                data = b""
            if not data:
                break
            os.write(sys.stderr.fileno(), data)
            *lines, rest = re.split(r"[\r\n]+", rest + CONTROL.sub("", data.decode(errors="replace")))
            self.tail.extend(line.rstrip() for line in lines if line.strip())
        if rest.strip():
            self.tail.append(rest.strip())

    def close(self) -> None:
        if self.thread.is_alive():
            self.thread.join(timeout=5)
        with contextlib.suppress(OSError):
            os.close(self.master)
