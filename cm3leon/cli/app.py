"""The command ``cm3leon``: a command for each stage, and the user's commands.

Heavy packages are imported inside the commands, so that ``cm3leon --help`` answers at once. What the user can mend is one line on
standard error and exit status 2; anything else is a traceback and status 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cm3leon.cli import convert, model
from cm3leon.cli.options import UsageError
from cm3leon.stages.common import STAGES, run_stage
from cm3leon.utils.errors import message_to_user

HELP = "Train, evaluate, version and serve a CM3leon model on your own licensed image-text collection."

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)


# --- stages ----------------------------------------------------------------------------------------------------------


def _stage_command(stage: str) -> Callable[[], None]:
    def command() -> None:
        run_stage(stage)

    return command


for _stage, _help in STAGES.items():
    if _stage == "evaluate":
        continue
    app.command(_stage, help=_help, rich_help_panel="Stages")(_stage_command(_stage))
    if "_" in _stage:
        app.command(_stage.replace("_", "-"), help=_help, hidden=True)(_stage_command(_stage))


@app.command(help=STAGES["evaluate"], rich_help_panel="Stages")
def evaluate(
    reproduce: Annotated[Path | None, typer.Option(help="evaluation record: evaluate again with its settings, compare every score")] = None,
) -> None:
    """Run the stage, or with ``--reproduce`` compare a new evaluation with a record; exit with 1 if a score differs."""
    if reproduce is None:
        run_stage("evaluate")
        return
    from cm3leon.config.loading import load_config
    from cm3leon.evaluation.run import reproduce as evaluate_again

    count, differing = evaluate_again(load_config(), reproduce)
    for name, recorded, again in differing:
        print(f"{name}: recorded {recorded}, now {again}")
    print(f"{count - len(differing)} of {count} scores of {reproduce} agree")
    if differing:
        raise typer.Exit(1)


# --- the project -----------------------------------------------------------------------------------------------------


@app.command(rich_help_panel="Project")
def configure(
    profile: Annotated[str, typer.Argument(help="a file of configs/, without .yaml")],
    changes: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; can be repeated")] = None,
) -> None:
    """Write the complete params.yaml of a profile, checked."""
    from cm3leon.config.profiles import PARAMS
    from cm3leon.config.profiles import configure as write

    write(profile, changes or [])
    print(f"{PARAMS}: profile {profile}" + "".join(f", {change}" for change in changes or []))


@app.command(rich_help_panel="Project")
def plan(
    profile: Annotated[str | None, typer.Option(help="a file of configs/, without .yaml; by default params.yaml")] = None,
    gpus: Annotated[int, typer.Option(help="number of GPUs, over all machines")] = 8,
    device: Annotated[str, typer.Option(help="h100, h200, a100, l40s ...; an unknown one lists all")] = "h100",
    mfu: Annotated[float, typer.Option(help="assumed model FLOPs utilization (MFU), as a share of the device's bfloat16 FLOP/s")] = 0.4,
    tokens: Annotated[float | None, typer.Option(help="tokens to train on; by default those of the profile's steps")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; can be repeated")] = None,
) -> None:
    """Estimate the memory on each GPU, the time and the disk space that pretraining needs; runs without a GPU."""
    from rich.console import Console

    from cm3leon.training import planning

    planning.show(planning.make_plan(planning.read_config(profile, changes or []), gpus, device, mfu, tokens), Console())


@app.command(rich_help_panel="Project")
def setup() -> None:
    """Prepare the MLflow store and check parameters and DVC; safe to repeat."""
    from cm3leon.services.environment import prepare_project

    for line in prepare_project():
        print(line)


@app.command(rich_help_panel="Project")
def ui(
    mlflow_port: Annotated[int, typer.Option(help="port to listen on; the next free one if it is in use")] = 5000,
    prefect_port: int = 4200,
    docs_port: int = 8000,
) -> None:
    """MLflow, Prefect and the Data Docs on 127.0.0.1, until Ctrl-C."""
    from cm3leon.services.local import serve

    serve(mlflow_port, prefect_port, docs_port)


@app.command("inspect", rich_help_panel="Project")
def inspect_document(
    document_id: Annotated[str, typer.Argument(help="id of a document, or an unambiguous beginning of it")] = "",
    epoch: Annotated[int, typer.Option(help="masks, neighbors and their order differ by epoch")] = 0,
    step: Annotated[int | None, typer.Option(help="show a row of this step's batch instead, as pretraining reads it")] = None,
    row: Annotated[int, typer.Option(help="which row of the batch")] = 0,
) -> None:
    """A sequence that pretraining reads, token by token: a document's, or a row of a step's batch with all samples packed into it."""
    from rich.console import Console

    from cm3leon.cli import inspect_sequence
    from cm3leon.config.loading import load_config

    if bool(document_id) == (step is not None):
        raise UsageError("inspect shows either a document (inspect DOCUMENT_ID) or a row of a batch (inspect --step 0 --row 0)")
    if step is None:
        inspect_sequence.show_document(document_id, Console(), load_config(), epoch)
    else:
        inspect_sequence.show_row(step, row, Console(), load_config())


# --- the registry ----------------------------------------------------------------------------------------------------

LISTED_SCORES = ("composition", "vqa_accuracy", "clip_score", "cider")
"""Columns of ``status``, of those scores that some version has."""


@app.command(rich_help_panel="Registry")
def status() -> None:
    """All registered versions with their aliases and scores, newest first."""
    from rich.console import Console
    from rich.table import Table

    from cm3leon.registry import registry

    versions = registry.status()
    if not versions:
        raise UsageError("no model is registered yet; run: make run")
    names = [name for name in LISTED_SCORES if any(name in version.scores for version in versions)]
    table = Table("version", "aliases", "created", "profile", *names, "gate")
    for version in versions:
        aliases = ", ".join(version.aliases)
        created = f"{version.created:%Y-%m-%d %H:%M} UTC"
        scores = [f"{version.scores[name]:.3f}" if name in version.scores else "" for name in names]
        table.add_row(str(version), aliases, created, version.tags.get("profile", ""), *scores, version.tags.get("gate", ""))
    Console().print(table)


@app.command(rich_help_panel="Registry")
def register() -> None:
    """Bundle the stages' outputs and register them as challenger."""
    from cm3leon.config.loading import load_config
    from cm3leon.registry import registry

    print(f"challenger: version {registry.register_outputs(load_config())}")


@app.command(rich_help_panel="Registry")
def gate() -> None:
    """Compare the challenger with the champion; exit status 1 if it is held back."""
    from cm3leon.config.loading import load_config
    from cm3leon.registry import registry

    verdict = registry.gate(load_config().gate)
    print(verdict)
    if not verdict.passed:
        raise typer.Exit(1)


@app.command(rich_help_panel="Registry")
def promote(force: Annotated[bool, typer.Option(help="promote it even if the gate has not passed it")] = False) -> None:
    """Make the challenger the champion."""
    from cm3leon.registry import registry

    print(f"champion: version {registry.promote(force)}")


@app.command(rich_help_panel="Registry")
def rollback() -> None:
    """Make the previous champion the champion again."""
    from cm3leon.registry import registry

    print(f"champion: version {registry.rollback()}")


# --- using a model ---------------------------------------------------------------------------------------------------

app.add_typer(model.app)
app.add_typer(convert.app)


# --- errors ----------------------------------------------------------------------------------------------------------


@contextmanager
def plain_errors() -> Iterator[None]:
    """Print users' errors as ``error: MESSAGE`` on standard error and exit with status 2, instead of a traceback."""
    try:
        yield
    except Exception as error:
        if (message := message_to_user(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Entry point of the command."""
    with plain_errors():
        app()


if __name__ == "__main__":
    main()
