"""The command ``cm3leon``: a command for each stage, and the user's commands.

Heavy packages are imported inside the commands, so that ``cm3leon --help`` answers at once. What the user can mend is one line on
standard error and exit status 2; anything else is a traceback and status 1.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from PIL import Image

    from cm3leon.generation.generator import GeneratedImage, Generator
    from cm3leon.model import Decoder

STAGES = {
    "ingest": "Bring the source into image shards and one manifest.",
    "validate": "Profile, check and quarantine documents; divide them into splits.",
    "image_tokenizer": "Train the VQ-GAN, or import one.",
    "text_tokenizer": "Train byte-level BPE.",
    "tokenize": "Images to codes, captions to ids.",
    "encoder": "The CLIP bi-encoder: pretrained, or trained here.",
    "index": "Embeddings and the FAISS memory bank.",
    "retrieve": "The neighbour table for training.",
    "pretrain": "CM3 pretraining of the decoder.",
    "sft": "Multitask instruction tuning.",
    "super_resolution": "Train the upscaler.",
    "evaluate": "Measure the finished model under a written contract.",
}
FIGURES = "figures: "
HELP = "Train, evaluate, version and serve a CM3leon model on your own licensed image-text collection."
CHAMPION = "models:/cm3leon@champion"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)
Model = Annotated[str, typer.Option(help="a registered model (models:/NAME@ALIAS) or a bundle directory")]
Seed = Annotated[int, typer.Option(help="the same seed draws the same")]


class UsageError(ValueError):
    """A command was given something it cannot use; the message says what to change."""


# --- stages ----------------------------------------------------------------------------------------------------------


def peak_megabytes() -> float:
    """The largest resident memory this process has had, MiB."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    except (OSError, IndexError, ValueError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def run_stage(stage: str) -> None:
    """Run a stage with ``params.yaml``; the last line printed is ``figures: {...}``, which the flow reads."""
    from cm3leon.config import load_config

    config, start = load_config(), time.monotonic()
    figures = importlib.import_module(f"cm3leon.stages.{stage}").run(config)
    resources = {"seconds": round(time.monotonic() - start, 2), "peak_megabytes": round(peak_megabytes(), 1)}
    if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun, one
        print(FIGURES + json.dumps({**figures, **resources}), flush=True)


def _stage_command(stage: str) -> Callable[[], None]:
    def command() -> None:
        run_stage(stage)

    return command


for _stage, _help in STAGES.items():
    app.command(_stage, help=_help, rich_help_panel="Stages")(_stage_command(_stage))
    if "_" in _stage:
        app.command(_stage.replace("_", "-"), help=_help, hidden=True)(_stage_command(_stage))


# --- the project -----------------------------------------------------------------------------------------------------


@app.command(rich_help_panel="Project")
def configure(
    profile: Annotated[str, typer.Argument(help="a file of configs/, without .yaml")],
    changes: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; can be given several times")] = None,
) -> None:
    """Write params.yaml from a profile, checked."""
    from cm3leon.profiles import PARAMS
    from cm3leon.profiles import configure as write

    write(profile, changes or [])
    print(f"{PARAMS}: profile {profile}" + "".join(f", {change}" for change in changes or []))


@app.command(rich_help_panel="Project")
def plan(
    profile: Annotated[str | None, typer.Option(help="a file of configs/, without .yaml; by default what params.yaml says")] = None,
    gpus: Annotated[int, typer.Option(help="how many, over all machines")] = 8,
    device: Annotated[str, typer.Option(help="h100, h200, a100, l40s ...; an unknown one lists all")] = "h100",
    mfu: Annotated[float, typer.Option(help="assumed share of the device's bfloat16 FLOP/s that goes into the model's")] = 0.4,
    tokens: Annotated[float | None, typer.Option(help="to train on; by default the profile's steps")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; can be given several times")] = None,
) -> None:
    """What pretraining needs: memory on each GPU, time, disk; needs no GPU itself."""
    from rich.console import Console

    from cm3leon import planning

    planning.show(planning.make_plan(planning.read_config(profile, changes or []), gpus, device, mfu, tokens), Console())


@app.command(rich_help_panel="Project")
def setup() -> None:
    """Prepare the MLflow store and check parameters and DVC; safe to repeat."""
    from flows.environment import prepare_project

    for line in prepare_project():
        print(line)


@app.command(rich_help_panel="Project")
def ui(
    mlflow_port: Annotated[int, typer.Option(help="the next free port is taken where this one is in use")] = 5000,
    prefect_port: int = 4200,
    docs_port: int = 8000,
) -> None:
    """MLflow, Prefect and the Data Docs on 127.0.0.1, until Ctrl-C."""
    from flows.ui import serve

    serve(mlflow_port, prefect_port, docs_port)


@app.command("inspect", rich_help_panel="Project")
def inspect_document(
    document_id: Annotated[str, typer.Argument(help="id of a document, or an unambiguous beginning of it")] = "",
    epoch: Annotated[int, typer.Option(help="masks, neighbours and their order differ by epoch")] = 0,
    step: Annotated[int | None, typer.Option(help="show a row of this step's batch instead, as pretraining reads it")] = None,
    row: Annotated[int, typer.Option(help="which row of the batch")] = 0,
) -> None:
    """A sequence that pretraining reads, token by token: a document's, or a row of a step's batch with all samples packed into it."""
    from rich.console import Console

    from cm3leon import inspection
    from cm3leon.config import load_config

    if bool(document_id) == (step is not None):
        raise UsageError("inspect shows either a document (inspect DOCUMENT_ID) or a row of a batch (inspect --step 0 --row 0)")
    if step is None:
        inspection.show_document(document_id, Console(), load_config(), epoch)
    else:
        inspection.show_row(step, row, Console(), load_config())


# --- the registry ----------------------------------------------------------------------------------------------------


@app.command(rich_help_panel="Registry")
def status() -> None:
    """All registered versions with their aliases and scores, newest first."""
    from rich.console import Console
    from rich.table import Table

    from cm3leon import registry

    versions = registry.status()
    if not versions:
        raise UsageError("nothing is registered yet; run: make run")
    names = list(dict.fromkeys(name for version in versions for name in version.scores))
    main = [name for name in ("composition", "vqa_accuracy", "clip_score", "cider") if name in names]
    table = Table("version", "aliases", "created", "profile", *main, "gate")
    for version in versions:
        scores = [f"{version.scores[name]:.3f}" if name in version.scores else "" for name in main]
        created = f"{version.created:%Y-%m-%d %H:%M} UTC"
        table.add_row(
            str(version), ", ".join(version.aliases), created, version.tags.get("profile", ""), *scores, version.tags.get("gate", "")
        )
    Console().print(table)


@app.command(rich_help_panel="Registry")
def register() -> None:
    """Bundle what the stages left and register it as challenger."""
    import tempfile

    from cm3leon import registry

    scratch = Path(".cache")
    scratch.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bundle-", dir=scratch) as folder:
        print(f"challenger: version {registry.register(registry.build_bundle(Path(folder) / 'bundle'))}")


@app.command(rich_help_panel="Registry")
def gate() -> None:
    """Compare the challenger with the champion; exit status 1 if it is held back."""
    from cm3leon import registry
    from cm3leon.config import load_config

    verdict = registry.gate(load_config().gate)
    print(verdict)
    if not verdict.passed:
        raise typer.Exit(1)


@app.command(rich_help_panel="Registry")
def promote(force: Annotated[bool, typer.Option(help="also if the gate has not passed it")] = False) -> None:
    """Make the challenger the champion."""
    from cm3leon import registry

    print(f"champion: version {registry.promote(force)}")


@app.command(rich_help_panel="Registry")
def rollback() -> None:
    """Make the previous champion the champion again."""
    from cm3leon import registry

    print(f"champion: version {registry.rollback()}")


# --- using a model ---------------------------------------------------------------------------------------------------


def find_model(model: str) -> Path:
    """The directory of a registered model, or the directory that was named.

    Raises:
        LookupError: if the registry has no such model.
    """
    if not model.startswith("models:/"):
        return Path(model)
    from cm3leon.registry import fetch_bundle

    try:
        return fetch_bundle(model)
    except LookupError as error:
        hint = "; there is no champion yet: run make run first" if model == CHAMPION else ""
        raise LookupError(f"{error}{hint}") from None


def load_generator(model: str) -> Generator:
    """A generator from a registered model or a bundle directory.

    Raises:
        LookupError: if the registry has no such model.
        FileNotFoundError: if there is no such bundle.
    """
    from cm3leon.generation.generator import Generator

    return Generator.from_bundle(find_model(model))


def open_image(path: Path) -> Image.Image:
    """An image file as RGB.

    Raises:
        FileNotFoundError: if there is none.
        UsageError: if it cannot be read as an image.
    """
    from cm3leon.data.images import ImageError, decode

    try:
        return decode(path.read_bytes())
    except ImageError as error:
        raise UsageError(f"{path}: {error}") from None


def save_images(images: list[GeneratedImage], out: Path) -> list[Path]:
    """Write each as a PNG with what made it in its metadata: the first as ``out.png``, the others ``out-2.png``, ``out-3.png`` ..."""
    files = [out if number == 1 else out.with_name(f"{out.stem}-{number}{out.suffix}") for number in range(1, len(images) + 1)]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    return files


@app.command(rich_help_panel="Model")
def generate(
    prompt: Annotated[str, typer.Argument(help="what to draw")],
    num_images: Annotated[int, typer.Option(min=1, help="how many; the best is OUT, the others OUT-2, OUT-3 ...")] = 1,
    out: Annotated[Path, typer.Option(help="PNG file to write, of the best image")] = Path("out.png"),
    seed: Seed = 0,
    guidance: Annotated[float | None, typer.Option(help="classifier-free guidance scale; 1: none")] = None,
    temperature: float | None = None,
    top_p: float | None = None,
    candidates: Annotated[int | None, typer.Option(help="images drawn for each one kept")] = None,
    likelihood: Annotated[float | None, typer.Option(help="weight of the caption's likelihood beside the CLIP score in ranking")] = None,
    documents: Annotated[int | None, typer.Option(help="retrieved documents before the prompt")] = None,
    upscale: Annotated[bool, typer.Option("--upscale", help="enlarge what was drawn with the model's upscaler")] = False,
    model: Model = CHAMPION,
) -> None:
    """Draw a prompt. Settings not given are the model's own."""
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: images are written as PNG; give a name that ends in .png")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no directory {out.parent}")
    generator = load_generator(model)
    settings: dict[str, Any] = {"guidance": guidance, "temperature": temperature, "top_p": top_p}
    settings |= {"candidates": candidates, "likelihood": likelihood, "documents": documents}
    [images] = generator.text_to_image([prompt], num_images, seed=seed, **settings)
    if upscale:
        for image, enlarged in zip(images, generator.upscale([image.image for image in images]), strict=True):
            image.image, image.settings = enlarged, {**image.settings, "upscale": True}
    for image, file in zip(images, save_images(images, out), strict=True):
        print(f"{file}: seed {image.seed}" + ("" if image.score is None else f", CLIP score {image.score:.3f}"))
    for neighbour in images[0].neighbours:
        credit = ", ".join(str(neighbour[key]) for key in ("licence", "attribution") if neighbour.get(key))
        print(f"retrieved: {neighbour.get('id')} {neighbour.get('caption')!r} ({credit})")


@app.command(rich_help_panel="Model")
def caption(
    images: Annotated[list[Path], typer.Argument(help="image files")],
    long: Annotated[bool, typer.Option(help="describe at length")] = False,
    model: Model = CHAMPION,
) -> None:
    """Describe images, a line for each."""
    opened = [open_image(path) for path in images]
    for path, text in zip(images, load_generator(model).caption(opened, long=long), strict=True):
        print(text if len(images) == 1 else f"{path}: {text}")


@app.command(rich_help_panel="Model")
def ask(
    image: Annotated[Path, typer.Argument(help="image file")],
    question: Annotated[str, typer.Argument(help="a question about it")],
    model: Model = CHAMPION,
) -> None:
    """Answer a question about an image."""
    opened = open_image(image)
    print(load_generator(model).answer([opened], [question])[0])


# --- other formats ---------------------------------------------------------------------------------------------------


class Format(StrEnum):
    """Formats of decoders that are not this package's own."""

    opt = "opt"


CheckpointFormat = Annotated[Format, typer.Option("--format", help="opt: Hugging Face's OPTForCausalLM, in safetensors")]


def check_unused(directory: Path) -> None:
    """Raises :class:`UsageError` unless ``directory`` is empty or not there yet."""
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file; name a directory")
    if directory.is_dir() and any(directory.iterdir()):
        raise UsageError(f"{directory} is not empty; name a new directory")


def load_decoder(directory: Path) -> Decoder:
    """The decoder of a stage's directory or of a bundle.

    Raises:
        FileNotFoundError: if there is no model.
        UsageError: if it is a model of another kind.
    """
    from cm3leon.model import Decoder

    config = directory / "config.json"
    if config.is_file() and not {"decoder", "vocabulary"} <= set(json.loads(config.read_text())):
        raise UsageError(f"{directory} holds another kind of model; a decoder is in models/pretrained, models/finetuned or a bundle")
    return Decoder.load(directory)


def described(decoder: Decoder) -> str:
    """``4 layers of width 256, context 256, 1,234,567 parameters``."""
    spec = decoder.spec
    return f"{spec.layers} layers of width {spec.width}, context {spec.context}, {decoder.parameter_count:,} parameters"


@app.command(rich_help_panel="Model")
def export(
    directory: Annotated[Path, typer.Argument(help="new directory to write")],
    format_: CheckpointFormat = Format.opt,
    model: Annotated[str, typer.Option(help="a registered model (models:/NAME@ALIAS), a bundle directory or a decoder's")] = CHAMPION,
) -> None:
    """Write a model's decoder as a checkpoint that other software reads."""
    check_unused(directory)
    decoder = load_decoder(find_model(model))
    from cm3leon.opt_format import export_opt

    export_opt(decoder, directory)
    print(f"{directory}: {described(decoder)}; read it with transformers.OPTForCausalLM.from_pretrained")


@app.command("import", rich_help_panel="Model")
def import_(
    directory: Annotated[Path, typer.Argument(help="the checkpoint: config.json and safetensors")],
    out: Annotated[Path, typer.Argument(help="new directory to write, in the format of models/pretrained")],
    format_: CheckpointFormat = Format.opt,
    vocabulary: Annotated[
        Path | None, typer.Option(help="a decoder's directory: the checkpoint has its vocabulary (not needed if exported by this package)")
    ] = None,
) -> None:
    """Read a checkpoint of other software as a decoder."""
    check_unused(out)
    layout = load_decoder(vocabulary).vocabulary if vocabulary else None
    from cm3leon.opt_format import import_opt

    decoder = import_opt(directory, layout)
    decoder.save(out)
    print(f"{out}: {described(decoder)}")


# --- errors ----------------------------------------------------------------------------------------------------------

USER_ERRORS = (
    "UsageError", "UserError", "ConfigError", "BadInputError", "PromptTooLongError", "UnknownDocumentError", "SourceError", "ManifestError",
    "ValidationError", "BundleError", "IncompleteRecordError", "PromotionError", "SplitError", "DivergenceError", "ProjectError",
    "OPTFormatError", "GrammarError",
)  # fmt: skip
"""Names of this package's errors that the user can mend; by name, so that nothing heavy is imported to know them."""


def is_users(error: Exception) -> bool:
    """Whether the message of ``error`` is all the user needs: ours by name, or the plain ones that commands above raise."""
    if type(error).__module__.split(".")[0] in ("cm3leon", "flows", "__main__") and type(error).__name__ in USER_ERRORS:
        return True
    return type(error) is LookupError or isinstance(error, (FileNotFoundError, IsADirectoryError, PermissionError, ConnectionError))


@contextmanager
def plain_errors() -> Iterator[None]:
    """One line ``error: ...`` (a longer message where the error has one) on standard error instead of a traceback, for users' errors."""
    try:
        yield
    except Exception as error:
        if not is_users(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Entry point of the command."""
    with plain_errors():
        app()


if __name__ == "__main__":
    main()
