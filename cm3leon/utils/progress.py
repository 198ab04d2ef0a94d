"""Progress of anything that takes longer than two seconds: a Rich bar on a terminal, a line every 15 seconds in a log."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")
LOG_SECONDS = 15.0


class Meter:
    """Counts units of work and shows the count; created by :func:`progress`."""

    def __init__(self, description: str, total: int | None, unit: str, bar: Progress | None, done: int, every: float = LOG_SECONDS) -> None:
        self.description, self.total, self.unit, self.bar, self.every = description, total, unit, bar, every
        self.done = self.initial = done
        self.note = ""
        self.start = self.last_line = time.monotonic()
        self.task = bar.add_task(description, total=total, completed=done, note="", rate="") if bar else None

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self.initial) / max(time.monotonic() - self.start, 1e-9)

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        """Count ``amount`` more units; ``note`` (a loss, for example) is shown after the bar."""
        self.done += amount
        self.note = self.note if note is None else note
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, advance=amount, note=self.note, rate=f"{self.rate:,.1f} {self.unit}/s")
        elif time.monotonic() - self.last_line >= self.every:
            self.last_line = time.monotonic()
            self._line()

    def _line(self) -> None:
        of = f"/{self.total}" if self.total else ""
        left = f", {(self.total - self.done) / max(self.rate, 1e-9):.0f} s left" if self.total and self.done < self.total else ""
        note = f" | {self.note}" if self.note else ""
        print(f"{self.description}: {self.done}{of} {self.unit}, {self.rate:,.1f}/s{left}{note}", file=sys.stderr, flush=True)


@contextmanager
def progress(description: str, total: int | None = None, unit: str = "it", done: int = 0, *, shown: bool = True) -> Iterator[Meter]:
    """A meter on standard error: a bar with rate and time left on a terminal, else a line every 15 seconds and one at the end.

    Args:
        done: units completed before, by the run that this one resumes.
        shown: False only counts, as processes of ``torchrun`` other than the first do.
    """
    shown = shown and os.environ.get("RANK", "0") == "0"
    if shown and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with Progress(*columns, console=Console(stderr=True)) as bar:
            yield Meter(description, total, unit, bar, done)
        return
    meter = Meter(description, total, unit, None, done, every=LOG_SECONDS if shown else math.inf)
    yield meter
    if shown and time.monotonic() - meter.start > 2:
        meter._line()


def track(items: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Iterate over ``items`` with a progress meter."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(description, total, unit) as meter:
        for item in items:
            yield item
            meter.advance()
