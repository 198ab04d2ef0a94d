"""``cm3leon data``: the outputs of the stages to and from a DVC remote, and an event for Prefect when their input has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Share data and models by a DVC remote; tell Prefect that data changed.")

Remote = Annotated[str | None, typer.Option(help="name of a DVC remote; by default the default one")]


@app.command()
def push(remote: Remote = None) -> None:
    """Copy the outputs that dvc.lock names to the remote."""
    from cm3leon.services import dvc_commands

    dvc_commands.push(dvc_commands.find_remote(remote), print)


@app.command()
def pull(
    version: Annotated[str | None, typer.Option(help="of the registry: 3, or @champion; by default what dvc.lock names here")] = None,
    remote: Remote = None,
    force: Annotated[bool, typer.Option(help="replace files and outputs that are kept nowhere else")] = False,
) -> None:
    """Bring the outputs that dvc.lock names here; with --version, those of a registered version, with its dvc.lock and params.yaml."""
    from cm3leon.services import dvc_commands

    found = dvc_commands.find_remote(remote)
    if version is not None:
        from cm3leon.registry.checkout import restore_lock
        from cm3leon.registry.provenance import lineage_of

        restored = restore_lock(version, force)
        commit = lineage_of(restored.number)["git_commit"] or "no commit"
        print(f"dvc.lock and params.yaml are those of version {restored}, whose code is that of {commit}")
    dvc_commands.pull(found, print, force)


@app.command()
def changed(
    path: Annotated[Path | None, typer.Argument(help="what a stage depends on, or something in it; by default ingest.path")] = None,
    force: Annotated[bool, typer.Option(help="send the event in any case")] = False,
) -> None:
    """Start the deployment on-data-change, by an event, if data are not those that dvc.lock names; once for each content."""
    from cm3leon.services.changes import tell_changed

    print(tell_changed(path, force))
