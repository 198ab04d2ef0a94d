"""Signals to a run in a terminal, and a run that is killed: how long it takes, what is left, what the next run does."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from flows_support import ROOT, make_toy

from cm3leon.services.leftovers import FLOW_RUNS, OWNED, PROCESSES
from cm3leon.utils.processes import has_ended, pid_of, stop_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
COMMAND = [sys.executable, "-m", "flows.pipeline", "--no-promote"]


@pytest.fixture
def environment(tmp_path: Path, prepared_prefect: Path) -> dict[str, str]:
    """Of a run in the toy project that has a Prefect server of its own."""
    make_toy(tmp_path)
    (tmp_path / ".prefect").mkdir()
    shutil.copyfile(prepared_prefect, tmp_path / ".prefect/prefect.db")
    (tmp_path / "fault.txt").write_text("slow")
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {**ours, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}


class Terminal:
    """A run whose controlling terminal is a pseudo-terminal."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.master, slave = os.openpty()
        self.process = subprocess.Popen(
            COMMAND,
            cwd=folder,
            env=environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - only a system call
        )
        os.close(slave)

    def end(self, seconds: float) -> tuple[int, str]:
        """Exit status and output of the run."""
        os.set_blocking(self.master, False)
        output = b""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            output += self._read()
            time.sleep(0.05)
        output += self._read()
        assert self.process.returncode is not None, f"it goes on after {seconds} s:\n{output.decode()}"
        return self.process.returncode, output.decode()

    def _read(self) -> bytes:
        try:
            return os.read(self.master, 1 << 20)
        except OSError:  # nothing there, or the last writer has closed
            return b""


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """Also after a test that fails."""
    yield
    for name in owned_names(tmp_path, PROCESSES):
        if not has_ended(name):
            stop_tree(pid_of(name), 5)


@pytest.fixture
def run(tmp_path: Path, environment: dict[str, str]) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path, environment)
    yield terminal
    stop_tree(terminal.process.pid, 5)
    os.close(terminal.master)


def wait_for_the_slow_stage(folder: Path) -> int:
    """The process id of its command."""
    working = folder / "working"
    wait_until(lambda: working.is_file() and working.read_text() != "", 90)
    return int(working.read_text())


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not after {seconds} s"
        time.sleep(0.05)


def owned_names(folder: Path, kind: str) -> list[str]:
    return [record.name for record in (folder / OWNED / kind).glob("*")]


def flow_runs(folder: Path) -> list[str]:
    """The states of the flow runs in the project's database, oldest first."""
    connection = sqlite3.connect(folder / ".prefect/prefect.db")
    try:
        return [row[0] for row in connection.execute("SELECT state_type FROM flow_run ORDER BY created")]
    finally:
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_within_seconds_and_quietly(run: Terminal, number: signal.Signals) -> None:
    command = wait_for_the_slow_stage(run.folder)
    servers = owned_names(run.folder, PROCESSES)
    if number == signal.SIGINT:
        os.write(run.master, b"\x03")  # Ctrl-C: the terminal sends it to the whole foreground group
    else:
        run.process.send_signal(number)
    status, output = run.end(15)
    assert status == 128 + number
    assert "Traceback" not in output, output
    assert "the next run resumes at the interrupted one" in output
    assert len(servers) == 2  # Prefect's server and DVC
    assert all(has_ended(name) for name in servers) and not psutil.pid_exists(command)
    assert flow_runs(run.folder) in (["CRASHED"], ["FAILED"])  # FAILED where the stage's end by Ctrl-C is seen first
    assert owned_names(run.folder, PROCESSES) == owned_names(run.folder, FLOW_RUNS) == []


def test_the_next_run_ends_what_a_killed_run_has_left(tmp_path: Path, environment: dict[str, str]) -> None:
    with subprocess.Popen(COMMAND, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        command = wait_for_the_slow_stage(tmp_path)
        killed.kill()
    left = owned_names(tmp_path, PROCESSES)
    assert len(left) == 2 and not any(has_ended(name) for name in left)  # Prefect's server and DVC
    assert flow_runs(tmp_path) == ["RUNNING"]

    (tmp_path / "fault.txt").write_text("")
    done = subprocess.run(COMMAND, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(has_ended(name) for name in left) and not psutil.pid_exists(command)
    assert flow_runs(tmp_path) == ["CRASHED", "COMPLETED"]


def test_a_dead_proxy_does_not_stand_before_the_server_of_a_run(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "fault.txt").write_text("")
    dead = {"HTTP_PROXY": "http://127.0.0.2:9", "HTTPS_PROXY": "http://127.0.0.2:9", "ALL_PROXY": "socks5://127.0.0.2:9"}
    environment = {name: value for name, value in environment.items() if name.lower() != "no_proxy"} | dead
    done = subprocess.run(COMMAND, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
