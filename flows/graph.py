"""The stage graph, read from DVC. Prefect's tasks are derived from it; there is no second list of stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """A DVC stage and the stages it directly depends on."""

    name: str
    needs: tuple[str, ...]


def stage_order(root: str | Path = ".") -> list[Stage]:
    """Every stage after all it depends on; among those that are ready, the order of ``dvc.yaml``.

    Raises:
        dvc.exceptions.DvcException: if ``dvc.yaml`` is missing or wrong, has a cycle, or two stages with the same output.
    """
    import networkx
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        graph = repo.index.graph  # edges point from a stage to what it depends on
        position = {stage: number for number, stage in enumerate(repo.index.stages)}
        order = networkx.lexicographical_topological_sort(graph.reverse(copy=True), key=position.__getitem__)
        return [Stage(stage.addressing, tuple(sorted(needed.addressing for needed in graph.successors(stage)))) for stage in order]


def affected(stages: list[Stage], changed: str) -> set[str]:
    """``changed`` and every stage that depends on it, directly or not. ``stages`` in topological order."""
    found = {changed}
    for stage in stages:
        if found & set(stage.needs):
            found.add(stage.name)
    return found
