"""How long stages took in earlier runs of the pipeline, as the tracking store knows it."""

from __future__ import annotations

from typing import Any

from cm3leon.tracking.runs import Run

PREFIX, SUFFIX = "pipeline/", "_seconds"
"""What stands before and after a stage's name in the metrics of a pipeline's run: only stages that ran have one."""
RUNS = 100
"""Most earlier runs that are looked at."""


def stage_seconds(metrics: dict[str, float]) -> dict[str, float]:
    """Stage -> seconds, of the metrics of a pipeline's run."""
    return {
        name.removeprefix(PREFIX).removesuffix(SUFFIX): value
        for name, value in metrics.items()
        if name.startswith(PREFIX) and name.endswith(SUFFIX)
    }


def last_seconds(run: Run, profile: str) -> dict[str, float]:
    """Stage -> its seconds in the last pipeline run before this one that ran it with the same profile; empty without a store."""

    def search(client: Any) -> list[Any]:
        wanted = f"tags.stage = 'pipeline' AND tags.profile = '{profile}'"
        return list(client.search_runs([run.experiment_id], wanted, order_by=["attributes.start_time DESC"], max_results=RUNS))

    found: dict[str, float] = {}
    for earlier in run.attempt("search for earlier runs", search) or []:
        if earlier.info.run_id != run.run_id:
            found = stage_seconds(earlier.data.metrics) | found
    return found
