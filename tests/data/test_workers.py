"""Worker processes: what they make arrives, whatever the program would do at its exit."""

import signal
import subprocess
import sys

from cm3leon.data.workers import ahead_by_workers

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


class Dispositions:
    """What a process does on SIGINT and SIGTERM."""

    def __getitem__(self, index: int) -> list[object]:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_signal_to_the_whole_group_does_not_end_a_worker_before_the_program_has_written_its_checkpoint():
    assert list(ahead_by_workers(Dispositions(), 1, 1, sampler=range(1))) == [[signal.SIG_IGN, signal.SIG_IGN]]
