"""A command never outlives the process that has started it, however that one ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cm3leon.services.child import OWNER, end_with_owner, run_command

ROOT = Path(__file__).parents[2]
STAGE = """
import pathlib, sys, time
from cm3leon.services.child import end_with_owner
end_with_owner()
print("running", flush=True)
time.sleep(300)
"""
FLOW = """
import subprocess, sys
from cm3leon.services.child import run_command
between = "import subprocess, sys; subprocess.run(sys.argv[1:])"  # as DVC is between a flow and its stage
run_command([sys.executable, "-c", between, sys.executable, "-c", sys.argv[1]], lambda line: print(line, flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stage_ends_within_seconds_after_its_flow_was_killed(number):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    flow = subprocess.Popen([sys.executable, "-c", FLOW, STAGE], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert flow.stdout is not None and flow.stdout.readline() == "running\n"
        descendants = psutil.Process(flow.pid).children(recursive=True)
        assert len(descendants) == 2
        flow.send_signal(number)
        flow.wait(10)
        _, alive = psutil.wait_procs(descendants, timeout=10)
        assert not alive
    finally:
        for process in descendants:
            if process.is_running():
                process.kill()
        flow.kill()


def test_a_command_is_told_who_has_started_it():
    lines: list[str] = []
    finished = run_command([sys.executable, "-c", f"import os; print(os.environ['{OWNER}'])"], lines.append)
    assert finished.status == 0 and lines == [str(os.getpid())]


def test_without_an_owner_nothing_is_watched(monkeypatch):
    import threading

    monkeypatch.delenv(OWNER, raising=False)
    before = threading.active_count()
    end_with_owner()
    assert threading.active_count() == before


def test_a_process_whose_owner_has_ended_already_ends(monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), OWNER: str(ended.pid)}
    stage = subprocess.run([sys.executable, "-c", STAGE], env=environment, check=False, timeout=60, capture_output=True)
    assert stage.returncode == -signal.SIGTERM and time.monotonic() - start < 20
