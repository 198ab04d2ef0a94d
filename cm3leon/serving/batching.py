"""One thread owns the generator and answers requests in order of arrival; those that differ only in texts and images share a batch.

A request is submitted as a :class:`Call` and answered through a future. The queue is bounded; a request in it can be withdrawn, and is
answered before the server stops.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from cm3leon.generation.generator import Generator
from cm3leon.serving.calls import Call, perform
from cm3leon.serving.errors import ApiError
from cm3leon.serving.metrics import Metrics

MAX_QUEUED_PIXELS = 100_000_000
"""Of all images in the queue, 300 MB."""


@dataclass(eq=False)
class Job:
    """A call that is queued or being answered."""

    call: Call
    future: Future[Any] = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)

    def answer(self, result: Any) -> None:
        """Set the result, or the error, unless the future was canceled."""
        with suppress(InvalidStateError):
            if isinstance(result, Exception):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)


class State(StrEnum):
    """The worker's state."""

    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"
    FAILED = "failed"


class Loaded(NamedTuple):
    """A generator, and the number of its version in the registry; None if it is not of a registry."""

    generator: Generator
    version: str | None = None


class Worker:
    """The thread and its queue.

    Args:
        load: loads the generator, in the thread.
        name: the model's id.
        capacity: most requests in the queue.
        max_rows: most sequences generated together, unless one request asks for more.
        wait_seconds: how long the first request of a batch waits for others.
    """

    def __init__(
        self,
        load: Callable[[], Loaded],
        metrics: Metrics,
        name: str,
        *,
        capacity: int = 64,
        max_rows: int = 64,
        wait_seconds: float = 0.005,
    ) -> None:
        self.name = name
        self.metrics, self.capacity, self.max_rows, self.wait_seconds = metrics, capacity, max_rows, wait_seconds
        self.state = State.LOADING
        self.generator: Generator | None = None
        self.version: str | None = None
        self.failure: Exception | None = None
        self._load = load
        self._queue: list[Job] = []
        self._running: list[Job] = []
        self._arriving = 0
        self._changed = threading.Condition()
        self._seconds_per_request = 1.0
        self._thread = threading.Thread(target=self._work, name="generator", daemon=True)
        metrics.queue_length.set_function(lambda: len(self._queue))

    def start(self) -> None:
        """Start the thread: it loads the generator, then answers."""
        self._thread.start()

    @property
    def queue_length(self) -> int:
        """Number of requests in the queue."""
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """True if the queue is empty and nothing is being answered."""
        with self._changed:
            return not self._queue and not self._running

    def ready(self) -> Generator:
        """The generator, for its properties; only the worker's thread calls its methods.

        Raises:
            ApiError: 503 while the model is being loaded and once the server stops.
        """
        if self.state is State.READY and self.generator is not None:
            return self.generator
        activity = "loading its model" if self.state is State.LOADING else "shutting down"
        raise ApiError(503, f"the server is {activity}; try again later", code=self.state, retry_after=5)

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """A request that becomes a call inside of the block: it counts as one that waits.

        Raises:
            ApiError: as :meth:`check_room`.
        """
        with self._changed:
            self.check_room()
            self._arriving += 1
        try:
            yield
        finally:
            with self._changed:
                self._arriving -= 1

    def check_room(self, pixels: int = 0) -> None:
        """Whether a call with images of so many pixels could be queued now.

        Raises:
            ApiError: 429 if the queue is full, 503 if the worker takes no calls.
        """
        with self._changed:
            self.ready()
            waiting = len(self._queue) + self._arriving
            # A call that waits alone is taken whatever its size.
            if waiting >= self.capacity or (self._queue and pixels + sum(job.call.pixels for job in self._queue) > MAX_QUEUED_PIXELS):
                seconds = max(1, math.ceil(self._seconds_per_request * waiting))
                raise ApiError(
                    429, f"{waiting} requests are queued already; try again in {seconds} s", code="queue_full", retry_after=seconds
                )

    def submit(self, call: Call) -> Future[Any]:
        """Queue a call.

        Raises:
            ApiError: as :meth:`check_room`.
        """
        with self._changed:
            self.check_room(call.pixels)
            job = Job(call)
            self._queue.append(job)
            self._changed.notify_all()
            return job.future

    def use(self, loaded: Loaded) -> None:
        """Answer with this generator from the next batch on; the one before is freed once its batch is answered."""
        with self._changed:
            self.generator, self.version = loaded
        self.metrics.model.info({"model": self.name, "version": self.version or ""})

    def withdraw(self, future: Future[Any]) -> None:
        """Remove a call from the queue, if its turn has not come."""
        with self._changed:
            self._queue = [job for job in self._queue if job.future is not future]
        future.cancel()

    def close(self) -> None:
        """Take no more calls; those in the queue are still answered."""
        with self._changed:
            self.state = State.STOPPING
            self._changed.notify_all()

    def abandon(self) -> None:
        """Refuse every call that is not answered yet."""
        with self._changed:
            unanswered, self._queue = self._queue + self._running, []
        for job in unanswered:
            job.answer(
                ApiError(503, "the server shut down before this request was answered; send it again", code="stopping", retry_after=5)
            )

    def join(self, seconds: float) -> bool:
        """Wait for the thread; True if it has ended in time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # --- in the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self.use(self._load())
        except Exception as error:
            self.failure, self.state = error, State.FAILED
            return
        with self._changed:
            self.state = State.READY if self.state is State.LOADING else self.state
        while jobs := self._take():
            assert self.generator is not None
            start = time.monotonic()
            self._answer(self.generator, jobs)
            # A moving average, from which a full queue tells clients when to try again.
            self._seconds_per_request += 0.2 * ((time.monotonic() - start) / len(jobs) - self._seconds_per_request)
            self._running = []

    def _take(self) -> list[Job]:
        """Wait for the next jobs to answer together; none once the worker is closed and the queue is empty."""
        with self._changed:
            while not self._running:
                # 1. Wait for a job.
                while not self._queue:
                    if self.state is State.STOPPING:
                        return []
                    self._changed.wait()
                # 2. Wait a little for others that can join it.
                deadline = time.monotonic() + self.wait_seconds
                while sum(job.call.rows for job in self._joinable()) < self.max_rows and (remaining := deadline - time.monotonic()) > 0:
                    self._changed.wait(remaining)
                # 3. Take them; those whose client disconnected meanwhile are dropped, maybe all.
                jobs = self._joinable()
                self._queue = [job for job in self._queue if job not in jobs]
                self._running = [job for job in jobs if job.future.set_running_or_notify_cancel()]
        for job in self._running:
            self.metrics.queue_seconds.labels(job.call.task).observe(time.monotonic() - job.submitted)
        return self._running

    def _joinable(self) -> list[Job]:
        """The oldest job, and those that can join it and fit."""
        joined: list[Job] = []
        rows = 0
        for job in self._queue:
            if not joined or (job.call.key == joined[0].call.key and rows + job.call.rows <= self.max_rows):
                joined.append(job)
                rows += job.call.rows
        return joined

    def _answer(self, generator: Generator, jobs: list[Job]) -> None:
        """Answer jobs together; if that fails, each alone, so that one that cannot be answered does not fail the others."""
        task, start = jobs[0].call.task, time.monotonic()
        self.metrics.batch_size.labels(task).observe(len(jobs))
        try:
            answered = list(zip(jobs, perform(generator, [job.call for job in jobs]), strict=True))
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].answer(error)
                return
            for job in jobs:
                self._answer(generator, [job])
            return
        self.metrics.model_seconds.labels(task).observe(time.monotonic() - start)
        for job, result in answered:
            job.answer(result)
