"""What a killed process has left is ended by the next one; what belongs to a living one, or to nobody of ours, is not."""

import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cm3leon.services.environment import PREFECT_HOME
from cm3leon.services.leftovers import FLOW_RUNS, OWNED, PROCESSES, abandoned, end_leftover_processes, owned
from cm3leon.utils.processes import identity

OWNER = """
import os, subprocess, sys
from cm3leon.services.environment import PREFECT_HOME
from cm3leon.services.leftovers import FLOW_RUNS, PROCESSES, owned
from cm3leon.utils.processes import identity
child = subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
with owned(PROCESSES, identity(child.pid)), owned(FLOW_RUNS, "run"):
    print(child.pid, flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_a_killed_owner_left_is_ended_once() -> None:
    owner = subprocess.run([sys.executable, "-c", OWNER], capture_output=True, text=True, check=False)
    assert owner.returncode == -9, owner.stderr
    child = int(owner.stdout)
    assert psutil.pid_exists(child)
    assert end_leftover_processes() == [child]
    assert not psutil.pid_exists(child)
    assert list(abandoned(FLOW_RUNS)) == ["run"]
    assert end_leftover_processes() == [] and list(abandoned(FLOW_RUNS)) == []


def test_what_a_living_owner_has_is_left_alone() -> None:
    with subprocess.Popen(["sleep", "600"]) as child:
        with owned(PROCESSES, identity(child.pid)), owned(FLOW_RUNS, "run"):
            assert end_leftover_processes() == [] and list(abandoned(FLOW_RUNS)) == []
            assert child.poll() is None
        assert stat.S_IMODE(PREFECT_HOME.stat().st_mode) == 0o700
        assert not list(OWNED.glob("*/*"))
        child.kill()


def test_a_process_that_was_given_the_same_id_is_not_ended() -> None:
    with subprocess.Popen(["sleep", "600"]) as child:
        host, pid, _ = identity(child.pid).split(":")
        (OWNED / PROCESSES).mkdir(parents=True)
        (OWNED / PROCESSES / f"{host}:{pid}:1").write_text(f"{host}:{pid}:1")
        assert end_leftover_processes() == []
        assert child.poll() is None
        child.kill()
