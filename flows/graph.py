"""The stage graph, read from DVC. Prefect's tasks are derived from it, so that there is one list of stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flows.damage import mend_files


@dataclass(frozen=True)
class Stage:
    """A DVC stage and the stages it directly depends on."""

    name: str
    needs: tuple[str, ...]


def stage_order(root: str | Path = ".") -> list[Stage]:
    """The stages in topological order; among those that are ready, in the order of ``dvc.yaml``. DVC's own files are mended first.

    Raises:
        dvc.exceptions.DvcException: if ``dvc.yaml`` is missing or invalid, has a cycle, or two stages with the same output.
    """
    import networkx
    from dvc.repo import Repo

    mend_files(Path(root))
    with Repo(str(root)) as repo:
        graph = repo.index.graph  # edges point from a stage to what it depends on
        position = {stage: number for number, stage in enumerate(repo.index.stages)}
        order = networkx.lexicographical_topological_sort(graph.reverse(copy=True), key=position.__getitem__)
        return [Stage(stage.addressing, tuple(sorted(needed.addressing for needed in graph.successors(stage)))) for stage in order]


def downstream_of(stages: list[Stage], name: str) -> list[str]:
    """Every stage that depends on stage ``name``, directly or not. ``stages`` in topological order, as is the result."""
    found: list[str] = []
    for stage in stages:
        if {name, *found} & set(stage.needs):
            found.append(stage.name)
    return found
