"""Python's garbage collector, for programs that import a million objects and then work with tensors."""

from __future__ import annotations

import atexit
import gc

THRESHOLDS = (50_000, 20, 100)
"""Objects made before a collection of the youngest, and collections before one of the older; with Python's own, imports take longer."""


def collect_rarely() -> None:
    """Collect less often, and at the end of the process nothing: all objects are given up then anyway."""
    gc.set_threshold(*THRESHOLDS)
    atexit.register(gc.freeze)
