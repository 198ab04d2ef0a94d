"""The supervisor keeps its parts through what is no fault of theirs: a full disk, and a server that a worker waits for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cm3leon.services import stack
from cm3leon.services.leftovers import OWNED, end_leftover_processes
from cm3leon.services.local import free_port
from cm3leon.services.stack import LOGS, Part
from cm3leon.services.supervisor import FAILURES, Kept
from cm3leon.utils.processes import has_ended, identity

ROOT = Path(__file__).parents[2]
FULL = Path("/dev/full")
SLEEP = ["-c", "import time; time.sleep(60)"]
KILLED = """
import os, sys
from cm3leon.services.stack import Part
from cm3leon.services.supervisor import Kept
kept = Kept(Part("part", sys.argv[1:], ""))
kept.start()
print(kept.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    LOGS.mkdir(parents=True)


def checked(kept: Kept, times: int) -> None:
    """Check as often, without the time between."""
    for _ in range(times):
        kept.next_check = kept.next_start = 0.0
        kept.check()


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_a_full_disk_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(Part("part", SLEEP, "http://127.0.0.1:9"))
    full = FULL.open("w")  # it cannot be closed as others: what is buffered has no place
    monkeypatch.setattr(sys, "stdout", full)
    kept.start()
    assert kept.process is not None
    kept.process.kill()
    kept.process.wait()
    checked(kept, 2)  # noticed, and started again
    assert kept.process is not None and kept.process.poll() is None
    kept.stop()
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space left"):
        full.close()


def test_a_part_that_cannot_be_started_is_tried_again() -> None:
    kept = Kept(Part("part", SLEEP, "http://127.0.0.1:9"))
    LOGS.rename("away")  # its log cannot be opened
    checked(kept, 1)
    assert kept.process is None and kept.next_start > time.monotonic()
    Path("away").rename(LOGS)
    checked(kept, 1)
    assert kept.process is not None and kept.process.poll() is None
    kept.stop()


def test_a_worker_is_stopped_for_its_own_fault_alone() -> None:
    port = free_port(0)
    server = f"http://127.0.0.1:{port}"
    kept = Kept(Part("worker", SLEEP, "http://127.0.0.1:9", needs=server))
    kept.start()
    assert kept.process is not None
    checked(kept, FAILURES + 1)
    assert kept.process is not None and kept.process.poll() is None
    needed = Kept(Part("server", ["-m", "http.server", str(port), "--bind", "127.0.0.1"], server))
    needed.start()
    needed.wait()
    checked(kept, FAILURES)
    assert kept.process is None
    needed.stop()


def test_the_parts_of_a_killed_supervisor_are_ended_by_the_next_up_or_down_and_not_by_a_run_of_their_worker() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, *SLEEP], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    part = identity(int(done.stdout.split()[-1]))
    assert end_leftover_processes() == [] and not has_ended(part)
    assert stack.down() and has_ended(part)
    assert not stack.down()


def test_a_part_that_has_ended_or_was_stopped_is_in_no_record() -> None:
    kept = Kept(Part("part", ["-c", ""], "http://127.0.0.1:9"))
    kept.start()
    assert kept.process is not None and list(OWNED.glob("*/*"))
    kept.process.wait()
    checked(kept, 1)
    assert kept.process is None and not list(OWNED.glob("*/*"))
    kept.start()
    kept.stop()
    assert not list(OWNED.glob("*/*"))
