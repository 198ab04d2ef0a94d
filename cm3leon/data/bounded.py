"""Work in processes that are ended when an item takes too much time or memory, so that no file stops a stage."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeVar

from cm3leon.utils.errors import UserError, message_to_user

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Done(Generic[Result]):
    """What became of an item.

    Attributes:
        result: None if it was too expensive.
        excess: what it took too much of; else None.
        error: the message of a user's error that ended the work, which is not the item's fault; else None.
        failure: the traceback of any other error; else None.
        warnings: what Python and the libraries in C warned of, each once.
    """

    result: Result | None
    excess: str | None = None
    error: str | None = None
    failure: str | None = None
    warnings: tuple[str, ...] = ()


def bounded_map(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, seconds: float, megabytes: float
) -> Iterator[Done[Result]]:
    """``work(item)`` of each item, in order, in ``workers`` processes.

    Args:
        seconds: an item that takes longer is given up, and its process ended.
        megabytes: memory that an item may allocate, in MB. Linux alone keeps this limit.

    Raises:
        UserError: that ``work`` has raised.
        RuntimeError: with the traceback of any other error of ``work``.
    """
    pool: list[_Worker] = [_Worker(work, items, megabytes) for _ in range(min(workers, len(items)))]
    waiting = iter(range(len(items)))
    found: dict[int, Done[Result]] = {}
    try:
        for worker in pool:
            worker.take(next(waiting, None))
        for number in range(len(items)):
            while number not in found:
                _collect(pool, found, seconds)
                for worker in pool:
                    if worker.number is None:
                        worker.take(next(waiting, None))
            done = found.pop(number)
            if done.error is not None:
                raise UserError(done.error)
            if done.failure is not None:
                raise RuntimeError(done.failure)
            yield done
    finally:
        for worker in pool:
            worker.end()


def _collect(pool: Sequence[_Worker], found: dict[int, Done[Any]], seconds: float) -> None:
    """Wait until an item is done, or its time is over."""
    busy = {worker.connection: worker for worker in pool if worker.number is not None}
    now = time.monotonic()
    remaining = min(worker.started + seconds for worker in busy.values()) - now
    for connection in wait(list(busy), max(0.0, remaining)):
        worker = busy.pop(connection)  # type: ignore[call-overload]
        number = worker.number
        try:
            found[number] = worker.connection.recv()
            worker.number = None
        except (EOFError, OSError):
            worker.restart()
            found[number] = Done(None, f"the process that read it ended with status {worker.status}")
    for worker in busy.values():
        if time.monotonic() - worker.started >= seconds and not worker.connection.poll():
            found[worker.number] = Done(None, f"more than {seconds:g} seconds")
            worker.restart()


class _Worker:
    """A process, and the number of the item that it works on."""

    def __init__(self, work: Callable[[Any], Any], items: Sequence[Any], megabytes: float) -> None:
        self.arguments = (work, items, megabytes)
        self.number: Any = None
        self.started = 0.0
        self.status: int | None = None
        self.process, self.connection = self._start()

    def _start(self) -> tuple[BaseProcess, Connection[Any, Any]]:
        context = multiprocessing.get_context("fork")  # what the work and the items refer to is shared
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, ours, *self.arguments), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def take(self, number: int | None) -> None:
        """Begin with an item, or with nothing if there is none."""
        self.number, self.started = number, time.monotonic()
        if number is not None:
            self.connection.send(number)

    def restart(self) -> None:
        """End the process, and start another one without an item."""
        self.end()
        self.number = None
        self.process, self.connection = self._start()

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()
        self.status = self.process.exitcode


def _serve(
    connection: Connection[Any, Any], parents: Connection[Any, Any], work: Callable[[Any], Any], items: Sequence[Any], megabytes: float
) -> None:
    """The work of a process: the items whose numbers it receives, until the program ends."""
    parents.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + int(megabytes * 1e6)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryFile(buffering=0) as errors:
        os.dup2(errors.fileno(), 2)
        while True:
            try:
                number = connection.recv()
            except EOFError:
                os._exit(0)
            connection.send(_done(work, items[number], megabytes, errors))


def _done(work: Callable[[Any], Any], item: Any, megabytes: float, errors: Any) -> Done[Any]:
    result, excess, message, failure = None, None, None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = work(item)
        except MemoryError:
            excess = f"more than {megabytes:g} MB of memory"
        except Exception as error:
            if (message := message_to_user(error)) is None:
                failure = traceback.format_exc()
    errors.seek(0)
    lines = errors.read().decode(errors="replace").splitlines()
    errors.seek(0)
    errors.truncate()
    told = dict.fromkeys([*(str(warning.message) for warning in caught), *filter(None, map(str.strip, lines))])
    return Done(result, excess, message, failure, tuple(told))
