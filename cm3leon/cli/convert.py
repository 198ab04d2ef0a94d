"""The commands that export decoders to other software and import them. Heavy packages are imported inside the commands."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cm3leon.cli.options import CHAMPION, PANEL, UsageError

if TYPE_CHECKING:
    from cm3leon.models.decoder import Decoder

app = typer.Typer()


class ExportFormat(StrEnum):
    """Formats that are written."""

    opt = "opt"
    transformers = "transformers"


class ImportFormat(StrEnum):
    """Formats that are read."""

    opt = "opt"


OPT = "opt: Hugging Face's OPTForCausalLM, in safetensors"
TRANSFORMERS = "transformers: any decoder, with both tokenizers and their code, for AutoModelForCausalLM"


def check_unused(directory: Path) -> None:
    """Raises :class:`UsageError` unless ``directory`` is empty or does not exist."""
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file; name a directory")
    if directory.is_dir() and any(directory.iterdir()):
        raise UsageError(f"{directory} is not empty; name a new directory")


def load_decoder(directory: Path) -> Decoder:
    """The decoder of a stage's directory or of a bundle.

    Raises:
        FileNotFoundError: if there is no model.
        UsageError: if it is another kind of model.
    """
    from cm3leon.models.decoder import Decoder
    from cm3leon.utils.files import read_file, read_json

    config = directory / "config.json"
    if config.is_file() and not {"decoder", "vocabulary"} <= set(read_file(config, read_json, "cm3leon pretrain")):
        raise UsageError(f"{directory} holds another kind of model; a decoder is in models/pretrained, models/finetuned or a bundle")
    return Decoder.load(directory)


def described(decoder: Decoder) -> str:
    """``4 layers of width 256, context 256, 1,234,567 parameters``."""
    spec = decoder.spec
    return f"{spec.layers} layers of width {spec.width}, context {spec.context}, {decoder.parameter_count:,} parameters"


@app.command(rich_help_panel=PANEL)
def export(
    directory: Annotated[Path, typer.Argument(help="new directory to write")],
    format_: Annotated[ExportFormat, typer.Option("--format", help=f"{TRANSFORMERS}; {OPT}")] = ExportFormat.transformers,
    model: Annotated[str, typer.Option(help="a registered model (models:/NAME@ALIAS), or the directory of a bundle or decoder")] = CHAMPION,
) -> None:
    """Export a model for other software: all that transformers needs to generate, or its decoder as OPT."""
    from cm3leon.registry.registry import find_bundle

    check_unused(directory)
    source = find_bundle(model)
    decoder = load_decoder(source)
    if format_ == ExportFormat.transformers:
        from cm3leon.registry.transformers_export import export_model

        export_model(decoder, source, directory)
        how = f"{directory / 'README.md'} says how to generate"
    else:
        from cm3leon.models.opt import export_opt

        export_opt(decoder, directory)
        how = "read it with transformers.OPTForCausalLM.from_pretrained"
    print(f"{directory}: {described(decoder)}; {how}")


@app.command("import", rich_help_panel=PANEL)
def import_(
    directory: Annotated[Path, typer.Argument(help="the checkpoint: config.json and safetensors")],
    out: Annotated[Path, typer.Argument(help="new directory to write, in the format of models/pretrained")],
    format_: Annotated[ImportFormat, typer.Option("--format", help=OPT)] = ImportFormat.opt,
    vocabulary: Annotated[
        Path | None,
        typer.Option(help="directory of a decoder with the same vocabulary; not needed for this package's own exports"),
    ] = None,
) -> None:
    """Import a checkpoint of another format as a decoder."""
    check_unused(out)
    layout = load_decoder(vocabulary).vocabulary if vocabulary else None
    from cm3leon.models.opt import import_opt

    decoder = import_opt(directory, layout)
    decoder.save(out)
    print(f"{out}: {described(decoder)}")
