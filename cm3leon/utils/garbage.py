"""Python's garbage collector, for programs that import a million objects and then work with tensors."""

from __future__ import annotations

import atexit
import gc

THRESHOLDS = (50_000, 20, 100)
"""Objects made before a collection of the youngest; Python's own 700 cost a quarter of the time in which torch and MLflow are imported."""


def collect_rarely() -> None:
    """Collect less often, and at the end of the process nothing: that took up to three seconds for objects that are given up anyway."""
    gc.set_threshold(*THRESHOLDS)
    atexit.register(gc.freeze)
