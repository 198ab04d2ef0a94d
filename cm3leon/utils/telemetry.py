"""Turns off the usage reports of the tools that a run uses."""

from __future__ import annotations

import os

OFF = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}


def turn_off() -> None:
    """Set :data:`OFF` for this process and its children; call before importing the tools. Variables that are set keep their values."""
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
