"""No program of a run reports to its makers."""

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
    """Set :data:`OFF` in this process and its children; call before the programs are imported. What the user has set stays."""
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
