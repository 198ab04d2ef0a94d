"""One thread owns the generator and answers requests in the order they came, those together that differ in texts and images alone.

A request is submitted as a :class:`Call` and answered through a future. What waits is bounded, can be withdrawn, and is finished before the
server stops.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from cm3leon.generation.generator import Generator
from cm3leon.serving.calls import Call, perform
from cm3leon.serving.errors import ApiError
from cm3leon.serving.metrics import Metrics


@dataclass(eq=False)
class Job:
    """A call that waits or is answered."""

    call: Call
    future: Future[Any] = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)

    def answer(self, result: Any) -> None:
        """Give the result, or the error, to whoever still waits for it."""
        with suppress(InvalidStateError):
            if isinstance(result, Exception):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)


class State(StrEnum):
    """What the worker does."""

    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"
    FAILED = "failed"


class Worker:
    """The thread and its queue.

    Args:
        load: makes the generator, in the thread.
        capacity: how many requests may wait.
        max_rows: how many sequences are generated together, unless one request asks for more.
        wait_seconds: how long the first of a batch waits for others.
    """

    def __init__(
        self, load: Callable[[], Generator], metrics: Metrics, *, capacity: int = 64, max_rows: int = 64, wait_seconds: float = 0.005
    ) -> None:
        self.metrics, self.capacity, self.max_rows, self.wait_seconds = metrics, capacity, max_rows, wait_seconds
        self.state = State.LOADING
        self.generator: Generator | None = None
        self.failure: Exception | None = None
        self._load = load
        self._queue: list[Job] = []
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._seconds_per_request = 1.0
        self._thread = threading.Thread(target=self._work, name="generator", daemon=True)
        metrics.queue_length.set_function(lambda: len(self._queue))

    def start(self) -> None:
        """Load the generator, then answer."""
        self._thread.start()

    @property
    def queue_length(self) -> int:
        """Requests that wait for their turn."""
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is being answered."""
        with self._changed:
            return not self._queue and not self._running

    def ready(self) -> Generator:
        """The generator, for its properties; only the thread calls its methods.

        Raises:
            ApiError: 503 while it is loaded and once the server stops.
        """
        if self.state is State.READY and self.generator is not None:
            return self.generator
        doing = "loading its model" if self.state is State.LOADING else "shutting down"
        raise ApiError(503, f"the server is {doing}; try again later", code=self.state, retry_after=5)

    def submit(self, call: Call) -> Future[Any]:
        """Queue a call.

        Raises:
            ApiError: 429 if the queue is full, 503 if the worker takes no calls.
        """
        with self._changed:
            self.ready()
            if len(self._queue) >= self.capacity:
                seconds = max(1, math.ceil(self._seconds_per_request * len(self._queue)))
                raise ApiError(
                    429, f"{len(self._queue)} requests wait already; try again in {seconds} s", code="queue_full", retry_after=seconds
                )
            job = Job(call)
            self._queue.append(job)
            self._changed.notify_all()
            return job.future

    def withdraw(self, future: Future[Any]) -> None:
        """Drop a call whose turn has not come."""
        with self._changed:
            self._queue = [job for job in self._queue if job.future is not future]
        future.cancel()

    def close(self) -> None:
        """Take no more calls; those that wait are still answered."""
        with self._changed:
            self.state = State.STOPPING
            self._changed.notify_all()

    def abandon(self) -> None:
        """Refuse all that is not answered yet."""
        with self._changed:
            left, self._queue = self._queue + self._running, []
        for job in left:
            job.answer(
                ApiError(503, "the server shut down before this request was answered; send it again", code="stopping", retry_after=5)
            )

    def join(self, seconds: float) -> bool:
        """Whether the thread ends in time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # --- in the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self.generator = self._load()
        except Exception as error:
            self.failure, self.state = error, State.FAILED
            return
        with self._changed:
            self.state = State.READY if self.state is State.LOADING else self.state
        while jobs := self._take():
            start = time.monotonic()
            self._answer(jobs)
            self._seconds_per_request += 0.2 * ((time.monotonic() - start) / len(jobs) - self._seconds_per_request)
            self._running = []

    def _take(self) -> list[Job]:
        """The next jobs to answer together, once there are any; none once the worker is closed and nothing waits."""
        with self._changed:
            while not self._running:
                while not self._queue:
                    if self.state is State.STOPPING:
                        return []
                    self._changed.wait()
                deadline = time.monotonic() + self.wait_seconds
                while sum(job.call.rows for job in self._joinable()) < self.max_rows and (left := deadline - time.monotonic()) > 0:
                    self._changed.wait(left)
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

    def _answer(self, jobs: list[Job]) -> None:
        """Answer jobs together; if that fails, each alone, so that one that cannot be answered does not fail the others."""
        assert self.generator is not None
        task, start = jobs[0].call.task, time.monotonic()
        self.metrics.batch_size.labels(task).observe(len(jobs))
        try:
            answered = list(zip(jobs, perform(self.generator, [job.call for job in jobs]), strict=True))
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].answer(error)
                return
            for job in jobs:
                self._answer([job])
            return
        self.metrics.model_seconds.labels(task).observe(time.monotonic() - start)
        for job, result in answered:
            job.answer(result)
