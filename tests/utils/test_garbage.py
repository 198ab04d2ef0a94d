"""Garbage is collected rarely, and not at all when a process ends."""

import subprocess
import sys

PROGRAM = """
import atexit, gc
from cm3leon.utils.garbage import collect_rarely
atexit.register(lambda: print(gc.get_freeze_count() > 1000))
collect_rarely()
before = gc.get_stats()[0]["collections"]
kept = [[] for _ in range(40_000)]
print(gc.get_stats()[0]["collections"] - before)
"""


def test_a_program_ends_without_collecting_what_it_gives_up():
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.split() == ["0", "True"]
