"""The command ``cm3leon``: a command for each stage, and the user's commands.

Heavy packages are imported inside the commands, so that ``cm3leon --help`` answers at once. What the user can mend is one line on
standard error and exit status 2; anything else is a traceback and status 1.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cm3leon.cli import convert, data, model
from cm3leon.cli.options import UsageError, check_place
from cm3leon.config import paths
from cm3leon.stages.common import STAGES, launched, run_stage
from cm3leon.utils.errors import message_to_user
from cm3leon.utils.garbage import collect_rarely
from cm3leon.utils.texts import as_unicode, is_unicode

SOURCES_HELP = (
    "ingest.source names the format: shapes (painted here), folder (images and a CSV, TSV, JSON Lines or parquet manifest), "
    "webdataset (tar shards), sidecar (a text file of captions beside each image), coco (annotations of COCO, Objects365 and others), "
    "localized_narratives and image_paragraphs (long captions), vqa (VQA v2, OK-VQA, VizWiz), scienceqa, open_images (boxes), "
    "instruct_pix2pix (parquet files of edits), mixture (several of these)."
)
HELP = "Train, evaluate, version and serve a CM3leon model on your own licensed image-text collection."

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)


# --- stages ----------------------------------------------------------------------------------------------------------


def _stage_command(stage: str) -> Callable[[], None]:
    def command() -> None:
        run_stage(stage)

    return command


def _training_command(stage: str) -> Callable[..., None]:
    def command(
        resume_from: Annotated[Path | None, typer.Option(help="resume from another run: a directory below models/checkpoints")] = None,
        accept_changes: Annotated[bool, typer.Option("--accept-changes", help="although its parameters, data or code differ")] = False,
    ) -> None:
        if accept_changes and resume_from is None:
            raise UsageError("--accept-changes belongs to --resume-from DIR")
        run_stage(stage, resume_from, accept_changes=accept_changes)

    return command


def _ingest_command() -> Callable[..., None]:
    def command(
        check: Annotated[
            int | None,
            typer.Option(min=1, help="show what is made of the first CHECK records, of a mixture of each part's, and write nothing"),
        ] = None,
    ) -> None:
        if check is None:
            run_stage("ingest")
            return
        from rich.console import Console

        from cm3leon.config.loading import load_config
        from cm3leon.data.preview import show_collection
        from cm3leon.stages.ingest import SOURCES

        show_collection(load_config().ingest, SOURCES, check, Console())

    return command


for _stage, _help in STAGES.items():
    if _stage == "evaluate":
        continue
    if _stage == "ingest":
        app.command(_stage, help=f"{_help} {SOURCES_HELP}", rich_help_panel="Stages")(_ingest_command())
        continue
    if _stage in ("pretrain", "sft"):
        app.command(_stage, help=_help, rich_help_panel="Stages")(_training_command(_stage))
        continue
    app.command(_stage, help=_help, rich_help_panel="Stages")(_stage_command(_stage))
    if "_" in _stage:
        app.command(_stage.replace("_", "-"), help=_help, hidden=True)(_stage_command(_stage))


@app.command(help=STAGES["evaluate"], rich_help_panel="Stages")
def evaluate(
    reproduce: Annotated[Path | None, typer.Option(help="evaluation record: evaluate again with its settings, compare every score")] = None,
    model: Annotated[str | None, typer.Option(help="bundle, or models:/cm3leon@champion: measure it, not the stages' outputs")] = None,
    out: Annotated[Path | None, typer.Option(help="directory for the record of --model; by default none is kept")] = None,
    params: Annotated[Path | None, typer.Option(help="parameters of the evaluation of --model; by default params.yaml")] = None,
) -> None:
    """Run the stage; or measure another model; or compare a new evaluation with a record and exit with 1 if a score differs."""
    if model is not None and reproduce is None:
        _evaluate_model(model, out, params or paths.PARAMS)
        return
    if out is not None or params is not None or model is not None:
        raise UsageError("--out and --params belong to --model, and --model cannot be combined with --reproduce")
    if reproduce is None:
        run_stage("evaluate")
        return
    from cm3leon.evaluation.run import reproduce as evaluate_again
    from cm3leon.utils.world import world

    config = launched("evaluate", "--reproduce", str(reproduce))
    with world() as processes:
        count, differing = evaluate_again(config, reproduce, processes)
    if processes.rank > 0:
        return
    for name, recorded, again in differing:
        print(f"{name}: recorded {recorded}, now {again}")
    print(f"{count - len(differing)} of {count} scores of {reproduce} agree")
    if differing:
        raise typer.Exit(1)


def _evaluate_model(model: str, out: Path | None, params: Path) -> None:
    """Measure a model under the present contract, and print its scores."""
    import tempfile

    from cm3leon.evaluation.run import evaluate as measure
    from cm3leon.generation.generator import Generator
    from cm3leon.registry.registry import find_bundle
    from cm3leon.services.child import end_with_owner
    from cm3leon.utils.world import world

    if out is not None and out.exists():
        raise UsageError(f"{out} exists; name a new directory")
    config = launched("evaluate", "--model", model, "--params", str(params), *(["--out", str(out)] if out else []), params=params)
    end_with_owner()
    with world() as processes, tempfile.TemporaryDirectory() as scratch:
        with processes.first_alone():
            bundle = find_bundle(model)
        record = measure(config, out or Path(scratch), Generator.from_bundle(bundle), processes)
    if processes.rank > 0:
        return
    for name, score in sorted(record.scores.items()):
        low, high = record.intervals.get(name, (score, score))
        print(f"{name:<40} {score:10.4f}  [{low:.4f}, {high:.4f}]")
    if record.seen:
        print(f"{len(record.seen)} of the test records may have been in this model's training data")
    if out is not None:
        print(f"record and sheets: {out}")


# --- the project -----------------------------------------------------------------------------------------------------


@app.command(rich_help_panel="Project")
def configure(
    profile: Annotated[str, typer.Argument(help="a file of configs/, without .yaml")],
    changes: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; can be repeated")] = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="sizes for minutes on a CPU; all else as on the profile's GPUs")] = False,
) -> None:
    """Write the complete params.yaml of a profile, checked."""
    from cm3leon.config.profiles import configure as write

    written = write(profile, changes or [], rehearse=rehearse)
    print(f"{paths.PARAMS}: profile {written.profile}" + "".join(f", {change}" for change in changes or []))


@app.command(rich_help_panel="Project")
def plan(
    profile: Annotated[str | None, typer.Option(help="a file of configs/, without .yaml; by default params.yaml")] = None,
    gpus: Annotated[int, typer.Option(help="number of GPUs, over all machines")] = 8,
    device: Annotated[str, typer.Option(help="h100, h200, a100, l40s ...; an unknown one lists all")] = "h100",
    mfu: Annotated[float, typer.Option(help="assumed model FLOPs utilization (MFU), as a share of the device's bfloat16 FLOP/s")] = 0.4,
    tokens: Annotated[float | None, typer.Option(help="tokens to train on; by default those of the profile's steps")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; can be repeated")] = None,
) -> None:
    """Estimate what pretraining needs of memory, time and disk, and the memory of every training stage; runs without a GPU."""
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
    mlflow_port: Annotated[int, typer.Option(min=1, max=65_535, help="port to listen on; the next free one if it is in use")] = 5000,
    prefect_port: Annotated[int, typer.Option(min=1, max=65_535)] = 4200,
    docs_port: Annotated[int, typer.Option(min=1, max=65_535)] = 8001,
) -> None:
    """MLflow, Prefect and the Data Docs on 127.0.0.1, until Ctrl-C."""
    from cm3leon.services.local import serve

    serve(mlflow_port, prefect_port, docs_port)


@app.command(rich_help_panel="Project")
def up(
    mlflow_port: Annotated[int, typer.Option(min=1, max=65_535, help="port to listen on; the next free one if it is in use")] = 5000,
    prefect_port: Annotated[int, typer.Option(min=1, max=65_535)] = 4200,
) -> None:
    """MLflow, Prefect, a worker and the deployments on 127.0.0.1, in the background, behind a password; safe to repeat."""
    from cm3leon.services import stack

    state = stack.up(mlflow_port, prefect_port)
    print(f"MLflow     {state.mlflow}\nPrefect    {state.prefect}\nuser       {stack.USER}, password in {stack.SECRETS}")
    print(f"logs       {stack.LOGS}/\nstop       cm3leon down")


@app.command(rich_help_panel="Project")
def down() -> None:
    """Stop what cm3leon up has started."""
    from cm3leon.services import stack

    print("stopped" if stack.down() else "nothing is up")


@app.command("inspect", rich_help_panel="Project")
def inspect_document(
    document_id: Annotated[str, typer.Argument(help="id of a document, or an unambiguous beginning of it")] = "",
    epoch: Annotated[int, typer.Option(help="masks, neighbors and their order differ by epoch")] = 0,
    step: Annotated[int | None, typer.Option(help="show a sample of this step instead, as pretraining reads it")] = None,
    row: Annotated[int, typer.Option(help="which sample of the step")] = 0,
) -> None:
    """A sequence that pretraining reads, token by token: a document's, or a sample of a step."""
    from rich.console import Console

    from cm3leon.cli import inspect_sequence
    from cm3leon.config.loading import load_config

    if bool(document_id) == (step is not None):
        raise UsageError("inspect shows either a document (inspect DOCUMENT_ID) or a sample of a step (inspect --step 0 --row 0)")
    if step is None:
        inspect_sequence.show_document(document_id, Console(), load_config(), epoch)
    else:
        inspect_sequence.show_row(step, row, Console(), load_config())


@app.command(rich_help_panel="Project")
def gc(
    keep: Annotated[int, typer.Option(min=1, help="newest versions to keep; those with an alias and former champions always stay")] = 5,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only show what would be removed")] = False,
) -> None:
    """Remove what no kept version needs: old versions, deleted MLflow runs, old checkpoints, unused objects of DVC's cache."""
    from cm3leon.registry.cleaning import clean
    from cm3leon.services.disk import readable

    freed = 0
    for what, size in clean(keep, dry_run):
        print(f"{readable(size):>10}  {what}", flush=True)
        freed += size
    print(f"{readable(freed):>10}  {'would be freed' if dry_run else 'freed'}: {freed:,} bytes")


@app.command(rich_help_panel="Project")
def backup(directory: Annotated[Path, typer.Argument(help="new directory to write")]) -> None:
    """Copy stores, password and parameters, which no run makes again, into a directory; also while the services are up."""
    from cm3leon.services import backup

    for path in backup.backup(directory):
        print(path)
    print(f"backup: {directory}; the outputs of the stages are not in it (cm3leon data push), nor is your own collection")
    if elsewhere := backup.databases_elsewhere():
        print(f"nor are the databases that {', '.join(elsewhere)} name{'' if elsewhere[1:] else 's'}: back them up where they are")


@app.command(rich_help_panel="Project")
def restore(directory: Annotated[Path, typer.Argument(help="what cm3leon backup has written")]) -> None:
    """Bring a backup into a fresh clone, at any path."""
    from cm3leon.services import backup

    for path in backup.restore(directory):
        print(path)
    print("restored; the outputs of the stages come by: cm3leon data pull")


app.add_typer(data.app, name="data", rich_help_panel="Project")


# --- the registry ----------------------------------------------------------------------------------------------------

LISTED_SCORES = ("composition", "vqa_accuracy", "clip_score", "cider")
"""Columns of ``status``, of those scores that some version has."""


@app.command(rich_help_panel="Registry")
def status() -> None:
    """All registered versions with their aliases and scores, newest first."""
    from cm3leon.cli import listing
    from cm3leon.registry import registry

    versions = registry.status()
    if not versions:
        raise UsageError("no model is registered yet; run: make run")
    names = [name for name in LISTED_SCORES if any(name in version.scores for version in versions)]
    listing.show(
        [
            {
                "version": str(version),
                "aliases": ", ".join(version.aliases),
                "created": f"{version.created:%Y-%m-%d %H:%M} UTC",
                "profile": version.tags.get("profile", ""),
                **{name: f"{version.scores[name]:.3f}" if name in version.scores else "" for name in names},
                "gate": version.tags.get("gate", ""),
            }
            for version in versions
        ]
    )


@app.command(rich_help_panel="Registry")
def register() -> None:
    """Bundle the stages' outputs and register them as challenger."""
    from cm3leon.config.loading import load_config
    from cm3leon.registry import registry

    print(f"challenger: version {registry.register_outputs(load_config())}")


Number = Annotated[int | None, typer.Option("--version", min=1, help="number of a version; by default the challenger")]


@app.command(rich_help_panel="Registry")
def gate(version: Number = None) -> None:
    """Compare a version with the champion; exit status 1 if it is held back."""
    from cm3leon.config.loading import load_config
    from cm3leon.registry import promotion

    verdict = promotion.gate(load_config(), number=_text(version))
    print(verdict)
    if not verdict.passed:
        raise typer.Exit(1)


@app.command(rich_help_panel="Registry")
def promote(
    version: Number = None,
    force: Annotated[bool, typer.Option(help="promote it even if the gate has not passed it; needs --reason")] = False,
    reason: Annotated[str, typer.Option(help="why; kept in the ledger")] = "",
) -> None:
    """Make a version the champion."""
    from cm3leon.registry import promotion

    print(f"champion: version {promotion.promote(_text(version), force, reason)}")


@app.command(rich_help_panel="Registry")
def rollback(
    to: Annotated[int | None, typer.Option(min=1, help="number of an earlier champion; by default the previous one")] = None,
    reason: Annotated[str, typer.Option(help="why; kept in the ledger")] = "",
) -> None:
    """Make an earlier champion the champion again."""
    from cm3leon.registry import promotion

    print(f"champion: version {promotion.rollback(_text(to), reason)}")


@app.command(rich_help_panel="Registry")
def history() -> None:
    """Who compared, promoted and rolled back which version, when and why, newest first."""
    from cm3leon.registry import promotion

    entries = promotion.history()
    if not entries:
        raise UsageError("no version has been compared or promoted yet; run: make run")
    for entry in entries:
        print(f"{entry.time:%Y-%m-%d %H:%M} UTC  {entry.who}  {entry.sentence}")
        for detail in (entry.verdict, f"reason: {entry.reason}" if entry.reason else ""):
            if detail:
                print(f"    {detail}")


@app.command(rich_help_panel="Registry")
def lineage(
    version: Annotated[int | None, typer.Argument(min=1, help="number of a version: what it was made of")] = None,
    document: Annotated[str | None, typer.Option(help="id or origin of a document: the versions trained on it")] = None,
    license_id: Annotated[str | None, typer.Option("--license", "--licence", help="SPDX identifier: the versions trained on it")] = None,
) -> None:
    """What a version was made of; or which versions were trained on a document, or on documents of a license."""
    import json

    from cm3leon.registry import provenance

    if version is not None:
        if document is not None or license_id is not None:
            raise UsageError("name a version, or a document, or a license")
        print(json.dumps(provenance.lineage_of(str(version)), indent=2))
        return
    uses = provenance.versions_trained_on(document, license_id)
    if not uses:
        print(f"no registered version was trained on {document or license_id}")
    for use in uses:
        named = f" ({', '.join(use.version.aliases)})" if use.version.aliases else ""
        if use.documents is None:
            print(f"version {use.version}{named}: not known, it was registered without a list of its training data")
            continue
        examples = ", ".join(f"{row.id} {row.origin}" for row in use.documents.head(3).itertuples())
        print(f"version {use.version}{named}: {len(use.documents):,} documents: {examples}{' ...' if len(use.documents) > 3 else ''}")


@app.command(rich_help_panel="Registry")
def drift(
    out: Annotated[Path, typer.Option(help="HTML page to write")] = Path(".cache/drift.html"),
) -> None:
    """Compare the new training data with the champion's; an error if it is further off than the section drift allows."""
    from cm3leon.config.loading import load_config
    from cm3leon.registry.drift import check_drift

    print(check_drift(load_config(), out))


@app.command(rich_help_panel="Registry")
def compare(
    models: Annotated[list[str], typer.Argument(help="two models: models:/cm3leon/3 models:/cm3leon@champion, or bundles")],
    prompts: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="text file, a prompt a line")],
    out: Annotated[Path, typer.Option(help="HTML page to write")] = Path("comparison.html"),
    seed: Annotated[int, typer.Option(min=0, help="of every prompt's noise, the same for both")] = 0,
) -> None:
    """Two models on the same prompts and seeds, next to each other on one page."""
    from cm3leon.registry.comparison import compare_models, read_prompts, summary
    from cm3leon.registry.registry import find_bundle

    if len(models) != 2:
        raise UsageError(f"compare takes two models, {len(models)} named: {' '.join(models)}")
    check_place(out)
    page, found = compare_models([(model, find_bundle(model)) for model in models], read_prompts(prompts), seed)
    out.write_text(page, encoding="utf-8")
    for name, compared in zip(models, found, strict=True):
        print(summary(name, compared))
    print(out)


def _text(number: int | None) -> str | None:
    return None if number is None else str(number)


# --- using a model ---------------------------------------------------------------------------------------------------

app.add_typer(model.app)
app.add_typer(convert.app)


# --- errors ----------------------------------------------------------------------------------------------------------


def check_encoding(arguments: Sequence[str]) -> None:
    """Raises :class:`UsageError` for an argument that is not UTF-8, unless it is the name of a file: those may have any bytes."""
    for number, argument in enumerate(arguments, 1):
        if not is_unicode(argument) and not Path(argument).exists():
            raise UsageError(f"argument {number}, '{as_unicode(argument)}', is not UTF-8, and no file has this name; write it in UTF-8")


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
    collect_rarely()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name of a file or a text that the terminal cannot show ends no command
            stream.reconfigure(errors="backslashreplace")
    with plain_errors():
        check_encoding(sys.argv[1:])
        app()


if __name__ == "__main__":
    main()
