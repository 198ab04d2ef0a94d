"""Worker processes: what they make arrives, whatever the program would do at its exit."""

import subprocess
import sys

PROGRAM = """
import threading
from cm3leon.data.workers import ahead_by_workers

started = threading.Event()
threading.Thread(target=started.wait, daemon=True).start()

def needs_its_thread():
    raise RuntimeError("the thread that sends logs is not there")

threading._register_atexit(needs_its_thread)
print(list(ahead_by_workers([3, 5, 8, 13], 2, 1, sampler=range(4))), flush=True)
"""


def test_a_worker_does_not_do_what_the_program_does_at_its_exit():
    """Prefect's services stop their threads at exit, which fails in a fork that has none: PyTorch then reported a failed worker."""
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert found.stdout == "[3, 5, 8, 13]\n", found.stderr
