"""Parts that the commands of a trained model share: options, their registration under the tasks' names, and reading and writing of files.

A command is named as its task, with hyphens (``cm3leon text-to-image``); the name with underscores is accepted too. Commands that generate
images have the options of :class:`ImageCall` and an option for each decoding setting of their task. Heavy packages are imported inside the
functions.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cm3leon.config.schema import DecodingConfig
from cm3leon.generation.checks import checked_settings
from cm3leon.generation.settings import SETTINGS, bounds_of, decoding_type, description_of
from cm3leon.utils.errors import UserError, message_to_user

if TYPE_CHECKING:
    from PIL import Image

    from cm3leon.generation.generator import Generator
    from cm3leon.generation.results import GeneratedImage
    from cm3leon.sequence.tasks import Box

CHAMPION = "models:/cm3leon@champion"
PANEL = "Model"
DEFAULT_OUT = Path("out.png")

app = typer.Typer()
"""The commands of ``cli/model.py``."""


class UsageError(UserError):
    """A command was given something it cannot use; the message says what to change."""


def setting_help(name: str) -> str:
    """The help of a decoding setting: its description and its bounds, which are checked with the other settings, not by the parser."""
    bounds = bounds_of(name)
    words = {"ge": "at least {}", "gt": "above {}", "le": "at most {}"}
    allowed = ", ".join(words[bound].format(value) for bound, value in bounds.items())
    return f"{description_of(name)} ({allowed})" if allowed else description_of(name)


def setting_option(name: str) -> Any:
    """The option of a decoding setting that is left out for the model's own value."""
    return typer.Option(help=setting_help(name), show_default=False)


Model = Annotated[str, typer.Option(help="a registered model (models:/NAME@ALIAS) or a bundle directory")]
Seed = Annotated[int, typer.Option(help="the same seed generates the same")]
ImageFile = Annotated[Path, typer.Argument(help="image file")]
ImageFiles = Annotated[list[Path], typer.Argument(help="image files")]
Temperature = Annotated[float, typer.Option(help=setting_help("temperature"))]
NumImages = Annotated[int, typer.Option(min=1, help="how many; the best is OUT, the others OUT-2, OUT-3 ...")]
Out = Annotated[Path, typer.Option(help="PNG file to write, of the best image")]
Upscale = Annotated[bool, typer.Option("--upscale", help="enlarge the images with the model's upscaler")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="a decoding setting, name=value, instead of the model's own; can be given several times")
]


@dataclass(frozen=True)
class ImageCall:
    """The options that all commands have which generate images; ``settings`` are decoding settings that differ from the model's own."""

    num_images: int
    out: Path
    seed: int
    upscale: bool
    settings: dict[str, Any]
    model: str

    def run(self, task: str, *items: Any, show_retrieved_documents: bool = False, **options: Any) -> None:
        """Load the model, generate, and write the images."""
        generator = load_generator(self.model)
        results = getattr(generator, task)(*items, self.num_images, seed=self.seed, **options, **self.settings)
        if self.upscale:
            from cm3leon.serving.calls import upscale

            with keeping(lambda: f"not enlarged: {', '.join(map(str, save(results, self.out, show_retrieved_documents)))}"):
                upscale([image for images in results for image in images], generator)
        save(results, self.out, show_retrieved_documents)


OWN_OPTIONS = frozenset(field.name.replace("_", "-") for field in fields(ImageCall) if field.name != "settings")
"""Options of commands that are no decoding settings."""

# --- registering commands --------------------------------------------------------------------------------------------


def register(task: str, function: Callable[..., None]) -> None:
    """Register a command under its task's name: with hyphens listed, with underscores hidden."""
    app.command(task.replace("_", "-"), rich_help_panel=PANEL)(function)
    if "_" in task:
        app.command(task, hidden=True)(function)


def former(old: str, new: str, function: Callable[..., None]) -> None:
    """Register the name that a command had in earlier versions: hidden, with a notice."""

    @functools.wraps(function)
    def command(**options: Any) -> None:
        notice(f"'cm3leon {old}' is now 'cm3leon {new}'")
        function(**options)

    command.__dict__["__signature__"] = inspect.signature(function, eval_str=True)
    app.command(old, hidden=True)(command)


def notice(message: str) -> None:
    """One line on standard error."""
    print(f"notice: {message}", file=sys.stderr)


def text_command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command that prints text, under its function's name."""
    register(function.__name__, function)
    return function


def image_command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command that generates images, under its function's name.

    The function's first parameter is an :class:`ImageCall`. The command has the options that make one instead: those of every such command,
    and one for each decoding setting of the task.
    """
    task = function.__name__

    @functools.wraps(function)
    def command(**options: Any) -> None:
        check_out(options["out"])
        named = {name: options.pop(name) for name in SETTINGS[task]}
        settings = decoding_changes(options.pop("changes"), named)
        common = {name: options.pop(name) for name in ("num_images", "out", "seed", "upscale", "model")}
        function(ImageCall(**common, settings=settings), **options)

    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    options: list[tuple[str, Any, Any]] = [("num_images", NumImages, 1), ("out", Out, DEFAULT_OUT), ("seed", Seed, 0)]
    options += [(name, Annotated[decoding_type(name) | None, setting_option(name)], None) for name in SETTINGS[task]]
    options += [("upscale", Upscale, False), ("changes", Changes, None), ("model", Model, CHAMPION)]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind) for name, kind, default in options]
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    command.__dict__["__signature__"] = inspect.Signature([*own, *added])
    register(task, command)
    return command


# --- arguments and results -------------------------------------------------------------------------------------------


def load_generator(model: str) -> Generator:
    """A generator from a registered model or a bundle directory.

    Raises:
        NotRegisteredError: if the registry has no such model.
        FileNotFoundError: if there is no such bundle.
    """
    from cm3leon.generation.generator import Generator
    from cm3leon.registry.registry import find_bundle

    return Generator.from_bundle(find_bundle(model))


def names_image(argument: str) -> bool:
    """Whether an argument that may be a text or an image is a file, or is called as an image file is."""
    from cm3leon.data.images import SUFFIXES

    path = Path(argument)
    try:
        return path.is_file() or (path.suffix.lower() in SUFFIXES and " " not in argument.strip())
    except OSError:  # too long for a name
        return False


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


def check_out(out: Path) -> None:
    """Raises :class:`UsageError` or :class:`FileNotFoundError` unless ``out`` can be written as PNG; before the model is loaded."""
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: images are written as PNG; give a name that ends in .png")
    check_place(out)


def check_place(out: Path) -> None:
    """Raises :class:`UsageError` or :class:`FileNotFoundError` unless there can be a file ``out``; before the model is loaded."""
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no directory {out.parent}")
    if out.is_dir():
        raise UsageError(f"--out {out}: this is a directory; name a file")


def decoding_changes(changes: list[str] | None, named: dict[str, Any]) -> dict[str, Any]:
    """Decoding settings from named options, of which None is none, and from ``name=value`` texts; checked before the model is loaded.

    Raises:
        UsageError: for a text without ``=``.
        BadInputError: for an unknown setting or an impossible value.
    """
    found = {name: value for name, value in named.items() if value is not None}
    for change in changes or []:
        name, equals, value = change.partition("=")
        if not equals:
            raise UsageError(f"--set {change}: write it as name=value")
        if (option := name.replace("_", "-")) in OWN_OPTIONS:
            raise UsageError(f"--set {change}: that is an option of its own: --{option} {value}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    checked_settings(DecodingConfig(), found)
    return found


def parse_box(text: str, what: str) -> Box:
    """A box from ``left,top,right,bottom``.

    Raises:
        UsageError: if it is something else.
    """
    try:
        left, top, right, bottom = (float(side) for side in text.split(","))
    except ValueError:
        raise UsageError(f"{what} {text!r}: write it as left,top,right,bottom, pixels with commas between them") from None
    return left, top, right, bottom


def numbered(out: Path, number: int, prefix: str = "") -> Path:
    """``out`` for number 1, else ``OUT-2`` and so on."""
    return out if number == 1 and not prefix else out.with_name(f"{out.stem}-{prefix}{number}{out.suffix}")


@contextmanager
def keeping(kept: Callable[[], str]) -> Iterator[None]:
    """What was made before is not lost where the block fails: the error says where it is.

    Args:
        kept: writes it, if need be, and says where; "" if there is nothing.
    """
    try:
        yield
    except Exception as error:
        if not (where := kept()):
            raise
        if (message := message_to_user(error)) is None:
            error.add_note(where)
            raise
        raise UsageError(f"{message}; {where}") from None


def save(results: list[list[GeneratedImage]], out: Path, show_retrieved_documents: bool) -> list[Path]:
    """Write images as PNG, with their record in the metadata, and print a line for each; those of several prompts as ``out-p1.png`` ...

    Returns:
        The files.
    """
    files: list[Path] = []
    for prompt, images in enumerate(results, 1):
        first = out if len(results) == 1 else numbered(out, prompt, "p")
        for rank, image in enumerate(images, 1):
            file = numbered(first, rank)
            image.save(file)
            files.append(file)
            print(f"{file}: seed {image.seed}" + ("" if image.score is None else f", CLIP score {image.score:.3f}"))
        for document in images[0].retrieved_documents:
            credit = ", ".join(str(document[key]) for key in ("licence", "attribution") if document.get(key))
            print(f"retrieved: {document['id']} ({credit})")
            if show_retrieved_documents:
                print(f"    {document['caption']!r}, score {document['score']:.3f}, source {document['source']}")
    return files
