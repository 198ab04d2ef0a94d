"""A working directory has one run at a time, and is free again however that run ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cm3leon.services.exclusive import BusyError, alone_in_directory

ROOT = Path(__file__).parents[2]
HOLD = """
import time
from cm3leon.services.exclusive import alone_in_directory
with alone_in_directory():
    print("alone", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def other(tmp_path, monkeypatch):
    """Another process that holds the working directory."""
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", HOLD], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "alone\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_and_told_which_process_is_there(other):
    reason = rf"another run works in {Path.cwd()} \(process {other.pid}\); wait until it has ended"
    with pytest.raises(BusyError, match=reason), alone_in_directory():
        pass


def test_the_directory_is_free_once_the_run_was_killed(other):
    other.kill()
    other.wait()
    for _ in range(2):
        with alone_in_directory():
            assert Path(".cache/run.lock").read_text() == str(os.getpid())


def test_children_do_not_hold_the_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with alone_in_directory():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    try:
        with alone_in_directory():
            pass
    finally:
        child.kill()
        child.wait()
