"""Interruption of a training run by signals, at the end of a step rather than in its middle."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruption() -> Iterator[Callable[[], int]]:
    """Hold back SIGTERM and SIGINT until a step is complete.

    Yields:
        A function that returns the number of the signal received, or 0; SIGTERM also if the parent process has ended.
    """
    received: list[int] = []
    parent = os.getppid()

    def receive(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        # An orphan's parent is another process: torchrun or the flow was killed and cannot send a signal any more.
        yield lambda: max(received, default=signal.SIGTERM if os.getppid() != parent else 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
