"""``torchrun`` with errors for people: the exit status is that of the process that failed first, and what it printed comes last.

By itself torchrun ends with status 1, and prints a traceback of its own and a table of all processes below the error.
"""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main as torchrun

USER_ERROR = 2
"""Exit status of a process that has said what the user can do; it needs no second message."""


def main() -> None:
    """Entry point of ``python -m cm3leon.training.torchrun``; takes torchrun's arguments."""
    # What it logs of processes that end, it also raises.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        torchrun()
    except ChildFailedError as error:
        rank, failure = _cause(error.failures)
        if failure.exitcode != USER_ERROR:
            print(f"process {rank} (id {failure.pid}) ended with {_named(failure.exitcode)}", file=sys.stderr, flush=True)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as error:
        sys.exit(f"ended by {error.sigval.name}")


def _cause(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The failure that came first, with its rank; after it torchrun ends the other processes by SIGTERM."""
    own = {rank: failure for rank, failure in failures.items() if failure.exitcode != -signal.SIGTERM} or failures
    rank = min(own, key=lambda rank: own[rank].timestamp)
    return rank, own[rank]


def _named(exitcode: int) -> str:
    return f"status {exitcode}" if exitcode > 0 else signal.Signals(-exitcode).name


if __name__ == "__main__":
    main()
