"""The automation of Prefect's server by which a run is marked as crashed once it shows no signs of life.

A flow run sends a heartbeat every :data:`HEARTBEAT_SECONDS`. A run whose process was killed, or whose host is gone, sends none and would
count as running for ever.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from cm3leon.services.events import post

HEARTBEAT_SECONDS = 30
"""Between two heartbeats of a flow run: Prefect's least (``prefect.toml`` and the deployments of ``prefect.yaml``)."""
SILENT_SECONDS = 75
"""Without one for so long, a run counts as crashed. One heartbeat may be lost."""
WAITS = "cm3leon.flow-run.waits"
"""Event of a flow run whose process has ended and that waits for a person: it is silent, and has not crashed."""
FLOWS = {"prefect.resource.role": "flow", "prefect.resource.name": "cm3leon*"}
"""The flows of this project: others on the same server may send heartbeats less often."""
CRASHED = "no signs of life: its process was killed, or its host is gone"

STUCK_RUNS: dict[str, Any] = {
    "name": "cm3leon: stuck runs",
    "description": f"Marks a flow run as crashed once it has sent no heartbeat for {SILENT_SECONDS} seconds.",
    "trigger": {
        "type": "event",
        "posture": "Proactive",
        "after": ["prefect.flow-run.heartbeat"],
        "expect": ["prefect.flow-run.*", WAITS],
        "match": {"prefect.resource.id": "prefect.flow-run.*"},
        "match_related": FLOWS,
        "for_each": ["prefect.resource.id"],
        "threshold": 1,
        "within": SILENT_SECONDS,
    },
    "actions": [{"type": "change-flow-run-state", "state": "CRASHED", "message": CRASHED}],
}


def mark_stuck_runs(environment: Mapping[str, str] = os.environ) -> None:
    """Create the automation on the server that ``environment`` names, unless it has one of that name: what was changed there stays.

    Raises:
        cm3leon.services.environment.ServerError: if there is no server, or it refuses.
    """
    name = STUCK_RUNS["name"]
    if not post("automations/filter", {"automations": {"name": {"any_": [name]}}}, environment):
        post("automations/", STUCK_RUNS, environment)
