"""What surrounds a flow that is started by hand: its server, its end by a signal, and what a killed run has left."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from types import FrameType
from uuid import UUID

from prefect import get_client
from prefect.client.schemas.objects import State
from prefect.events.worker import EventsWorker
from prefect.exceptions import ObjectNotFound, TerminationSignal
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Crashed, Failed

from cm3leon.services.exclusive import BusyError, alone_in_directory
from cm3leon.services.leftovers import FLOW_RUNS, abandoned, end_leftover_processes
from cm3leon.services.local import temporary_prefect
from cm3leon.utils.errors import UserError
from cm3leon.utils.garbage import collect_rarely


@contextmanager
def prefect_api() -> Iterator[None]:
    """The server that ``PREFECT_API_URL`` names or that of ``cm3leon ui``; if there is none, one of our own until the block ends.

    Raises:
        ServiceError: if a server of our own does not start.
    """
    end_leftover_processes()
    if PREFECT_API_URL.value():
        yield
    else:
        with temporary_prefect() as url, temporary_settings({PREFECT_API_URL: url}):
            try:
                yield
            finally:
                send_pending()


def dated(what: str) -> str:
    """The name of a flow run that begins now, as "champion 2026-05-31 06:00"."""
    return f"{what} {datetime.now():%Y-%m-%d %H:%M}"  # noqa: DTZ005 - the reader's own clock


def alone(work: Callable[[], State]) -> State:
    """What a flow's work returns; the flow is the only run in this directory, and clears first what a killed one has left.

    Returns:
        Failed with one line for an error that the user can mend, Cancelled if another run works here.
    """
    try:
        with alone_in_directory():
            clear_leftovers()
            return work()
    except BusyError as error:
        return Cancelled(message=str(error))
    except UserError as error:
        return Failed(message=str(error))


def send_pending() -> None:
    """Send the logs and events that Prefect still has in its queues: at the exit of the process it would find no server."""
    for queue in (APILogWorker, EventsWorker):
        queue.drain_all(timeout=5)


def clear_leftovers() -> None:
    """End the processes that a killed run has left, and mark its flow run as crashed: nothing else would."""
    end_leftover_processes()
    for flow_run_id in map(UUID, abandoned(FLOW_RUNS)):
        with get_client(sync_client=True) as client, suppress(ObjectNotFound):  # another server may have it
            state = client.read_flow_run(flow_run_id).state
            if state is None or not state.is_final():
                client.set_flow_run_state(flow_run_id, Crashed(message="its process was killed"), force=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise TerminationSignal(number)


class _CtrlC:
    """A handler of SIGINT that remembers it: a stage, which gets Ctrl-C too, can fail before the run notices its own."""

    def __init__(self) -> None:
        self.received = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        raise KeyboardInterrupt


def until_interrupted(main: Callable[[], int]) -> int:
    """The exit status of ``main``; 2 after a user's error, 128 plus the number after Ctrl-C, SIGTERM or SIGHUP, with one line."""
    collect_rarely()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    ctrl_c = _CtrlC()
    signal.signal(signal.SIGINT, ctrl_c)
    try:
        status = main()
        if not ctrl_c.received:
            return status
        ended_by = int(signal.SIGINT)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        ended_by = int(signal.SIGINT)
    except TerminationSignal as error:
        ended_by = int(error.signal)
    print("interrupted; completed stages are kept, and the next run resumes at the interrupted one", file=sys.stderr)
    return 128 + ended_by
