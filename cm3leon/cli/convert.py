"""The commands that export decoders to other software and import them. Heavy packages are imported inside the commands."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cm3leon.cli.options import CHAMPION, PANEL, UsageError

if TYPE_CHECKING:
    from cm3leon.models.decoder import Decoder

app = typer.Typer()


class Format(StrEnum):
    """Formats of decoders other than this package's own."""

    opt = "opt"


CheckpointFormat = Annotated[Format, typer.Option("--format", help="opt: Hugging Face's OPTForCausalLM, in safetensors")]


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

    config = directory / "config.json"
    if config.is_file() and not {"decoder", "vocabulary"} <= set(json.loads(config.read_text())):
        raise UsageError(f"{directory} holds another kind of model; a decoder is in models/pretrained, models/finetuned or a bundle")
    return Decoder.load(directory)


def described(decoder: Decoder) -> str:
    """``4 layers of width 256, context 256, 1,234,567 parameters``."""
    spec = decoder.spec
    return f"{spec.layers} layers of width {spec.width}, context {spec.context}, {decoder.parameter_count:,} parameters"


@app.command(rich_help_panel=PANEL)
def export(
    directory: Annotated[Path, typer.Argument(help="new directory to write")],
    format_: CheckpointFormat = Format.opt,
    model: Annotated[str, typer.Option(help="a registered model (models:/NAME@ALIAS), or the directory of a bundle or decoder")] = CHAMPION,
) -> None:
    """Export a model's decoder as a checkpoint of another format."""
    from cm3leon.registry.registry import find_bundle

    check_unused(directory)
    decoder = load_decoder(find_bundle(model))
    from cm3leon.models.opt import export_opt

    export_opt(decoder, directory)
    print(f"{directory}: {described(decoder)}; read it with transformers.OPTForCausalLM.from_pretrained")


@app.command("import", rich_help_panel=PANEL)
def import_(
    directory: Annotated[Path, typer.Argument(help="the checkpoint: config.json and safetensors")],
    out: Annotated[Path, typer.Argument(help="new directory to write, in the format of models/pretrained")],
    format_: CheckpointFormat = Format.opt,
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
