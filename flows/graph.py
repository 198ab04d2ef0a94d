"""The stage graph, read from DVC. Prefect's tasks are derived from it, so that there is one list of stages."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from cm3leon.utils.errors import UserError
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


def missing_parameters(root: str | Path = ".") -> list[str]:
    """Keys that ``dvc.yaml`` names and ``params.yaml`` lacks. DVC itself would refuse them after the stage that depends on one has run."""
    from dvc.dependency import ParamsDependency
    from dvc.repo import Repo

    missing: set[str] = set()
    with Repo(str(root)) as repo:
        for stage in repo.index.stages:
            for dependency in stage.deps:
                if isinstance(dependency, ParamsDependency):
                    missing |= set(dependency.params) - dependency.read_params().keys()
    return sorted(missing)


def downstream_of(stages: list[Stage], name: str) -> list[str]:
    """Every stage that depends on stage ``name``, directly or not. ``stages`` in topological order, as is the result."""
    found: list[str] = []
    for stage in stages:
        if {name, *found} & set(stage.needs):
            found.append(stage.name)
    return found


def stale_stages(stages: list[Stage], root: str | Path = ".") -> list[str]:
    """The stages that a run will bring up to date: those that changed, and all that depend on them. ``stages`` in topological order."""
    from dvc.repo import Repo

    with Repo(str(root), _wait_for_lock=True) as repo:  # another run of this project holds the lock for moments
        stale = set(repo.status())
    for stage in stages:
        if stale & set(stage.needs):
            stale.add(stage.name)
    return [stage.name for stage in stages if stage.name in stale]


def from_stage(stages: list[Stage], first: str, root: str | Path = ".") -> list[Stage]:
    """The stage ``first`` and every stage that depends on it, for a run that takes the outputs of the others as they are.

    Args:
        stages: all, in topological order.
        first: a stage's name.
        root: directory of the project.

    Raises:
        UserError: if there is no stage of that name, or one of whose outputs the result depends is out of date.
    """
    names = [stage.name for stage in stages]
    if first not in names:
        raise UserError(f"first_stage {first!r} is no stage; the stages are: {', '.join(names)}")
    chosen = {first, *downstream_of(stages, first)}
    stale = stale_stages(stages, root)
    if stale := [name for name in upstream_of(stages, chosen) if name in stale]:
        raise UserError(f"a run from {first} on needs stages that are out of date: {', '.join(stale)}; run the whole pipeline once")
    return [replace(stage, needs=tuple(name for name in stage.needs if name in chosen)) for stage in stages if stage.name in chosen]


def upstream_of(stages: list[Stage], names: Collection[str]) -> list[str]:
    """Every other stage on which one of ``names`` depends, directly or not. ``stages`` in topological order, as is the result."""
    needed = set(names)
    for stage in reversed(stages):
        if stage.name in needed:
            needed.update(stage.needs)
    return [stage.name for stage in stages if stage.name in needed - set(names)]
