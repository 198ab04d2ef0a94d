"""A command never outlives the process that has started it, however that one ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cm3leon.services import leftovers
from cm3leon.services.child import OWNER, end_with_owner, run_command
from cm3leon.services.leftovers import OWNED, end_leftover_processes
from cm3leon.utils.processes import has_ended, identity, stop_tree

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
def test_a_stage_ends_within_seconds_after_its_flow_was_killed(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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


def test_a_stage_that_outlives_its_flow_is_ended_by_the_next_run(tmp_path, monkeypatch):
    """It finishes its step, while DVC and then the flow end: a cancel leaves them 30 s."""
    monkeypatch.chdir(tmp_path)
    slow = f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{STAGE}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    flow = subprocess.Popen([sys.executable, "-c", FLOW, slow], env=environment, stdout=subprocess.PIPE, text=True)
    assert flow.stdout is not None and flow.stdout.readline() == "running\n"
    between, stage = psutil.Process(flow.pid).children(recursive=True)
    dvc, left = identity(between.pid), identity(stage.pid)
    try:
        assert end_leftover_processes() == []
        between.kill()
        flow.kill()
        flow.wait(10)
        while not has_ended(dvc):
            time.sleep(0.1)
        monkeypatch.setattr(leftovers, "stop_tree", lambda pid: stop_tree(pid, seconds=1))
        assert end_leftover_processes() == [stage.pid]
        end = time.monotonic() + 10  # SIGKILL was sent, which ends it soon
        while not has_ended(left) and time.monotonic() < end:
            time.sleep(0.1)
        assert has_ended(left)
        assert not list(OWNED.glob("*/*"))
    finally:
        if stage.is_running():
            stage.kill()


def test_a_stage_that_ends_leaves_no_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = f"{STAGE.replace('time.sleep(300)', '')}\nprint(*pathlib.Path('.prefect/owned').glob('*/*'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT), OWNER: str(os.getpid())},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert ".prefect/owned/processes/" in done.stdout and not list(OWNED.glob("*/*"))


def test_a_command_is_told_who_has_started_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    finished = run_command([sys.executable, "-c", f"import os; print(os.environ['{OWNER}'])"], lines.append)
    assert finished.status == 0 and lines == [str(os.getpid())]


def test_without_an_owner_nothing_is_watched(monkeypatch):
    import threading

    monkeypatch.delenv(OWNER, raising=False)
    before = threading.active_count()
    end_with_owner()
    assert threading.active_count() == before


def test_a_process_whose_owner_has_ended_already_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), OWNER: str(ended.pid)}
    stage = subprocess.run([sys.executable, "-c", STAGE], env=environment, check=False, timeout=60, capture_output=True)
    assert stage.returncode == -signal.SIGTERM and time.monotonic() - start < 20
