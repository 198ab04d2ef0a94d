"""The commands that use a trained model: one for each task, and ``serve``.

A command is named as its task, with hyphens (``cm3leon text-to-image``); the name with underscores is accepted too. Commands that generate
images have the options of :class:`ImageCall` and an option for each decoding setting of their task. Heavy packages are imported inside the
commands.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cm3leon.config.schema import DecodingConfig
from cm3leon.generation.settings import SETTINGS, bounds_of, checked_settings, decoding_type, description_of
from cm3leon.utils.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from cm3leon.generation.generator import Generator
    from cm3leon.generation.results import GeneratedImage
    from cm3leon.sequence.tasks import Box

CHAMPION = "models:/cm3leon@champion"
PANEL = "Model"
DEFAULT_OUT = Path("out.png")

app = typer.Typer()


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

            upscale([image for images in results for image in images], generator)
        save(results, self.out, show_retrieved_documents)


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
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no directory {out.parent}")


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


def save(results: list[list[GeneratedImage]], out: Path, show_retrieved_documents: bool) -> None:
    """Write images as PNG, with their record in the metadata, and print a line for each; those of several prompts as ``out-p1.png`` ..."""
    for prompt, images in enumerate(results, 1):
        first = out if len(results) == 1 else numbered(out, prompt, "p")
        for rank, image in enumerate(images, 1):
            file = numbered(first, rank)
            image.save(file)
            print(f"{file}: seed {image.seed}" + ("" if image.score is None else f", CLIP score {image.score:.3f}"))
        for document in images[0].retrieved_documents:
            credit = ", ".join(str(document[key]) for key in ("licence", "attribution") if document.get(key))
            print(f"retrieved: {document['id']} ({credit})")
            if show_retrieved_documents:
                print(f"    {document['caption']!r}, score {document['score']:.3f}, source {document['source']}")


# --- images ----------------------------------------------------------------------------------------------------------


@image_command
def text_to_image(
    call: ImageCall,
    prompts: Annotated[list[str], typer.Argument(help="what the images show")],
    reference: Annotated[Path | None, typer.Option(help="an image by which documents are retrieved too")] = None,
    show_retrieved_documents: Annotated[
        bool, typer.Option("--show-retrieved-documents", help="print caption, score and source of the retrieved documents")
    ] = False,
) -> None:
    """Generate images of prompts. Settings not given are the model's own."""
    references = None if reference is None else [open_image(reference)] * len(prompts)
    call.run("text_to_image", prompts, references=references, show_retrieved_documents=show_retrieved_documents)


@image_command
def write(call: ImageCall, texts: Annotated[list[str], typer.Argument(help="the words in the images")]) -> None:
    """Generate images of texts as writing."""
    call.run("write", texts)


@image_command
def layout_to_image(
    call: ImageCall,
    caption: Annotated[str, typer.Argument(help="what the image shows")],
    objects: Annotated[list[str], typer.Option("--object", help="label=left,top,right,bottom in pixels of the image; several times")],
) -> None:
    """Generate images of a caption with objects inside boxes."""
    layout = []
    for given in objects:
        label, equals, box = given.rpartition("=")
        if not equals:
            raise UsageError(f"--object {given}: write it as label=left,top,right,bottom")
        layout.append((label, parse_box(box, f"--object {label}:")))
    call.run("layout_to_image", [caption], [layout])


@image_command
def condition_to_image(
    call: ImageCall,
    caption: Annotated[str, typer.Argument(help="what the image shows")],
    image: ImageFile,
    kind: Annotated[str, typer.Option(help="of the condition image: 'canny edge', 'segmentation map' ...; an unknown kind lists all")],
) -> None:
    """Generate images of a caption with the structure that a condition image shows."""
    call.run("condition_to_image", [caption], [open_image(image)], [kind])


@image_command
def edit(call: ImageCall, image: ImageFile, instruction: Annotated[str, typer.Argument(help="what to change")]) -> None:
    """Change an image as an instruction says."""
    call.run("edit", [open_image(image)], [instruction])


@image_command
def infill(
    call: ImageCall,
    image: ImageFile,
    box: Annotated[str, typer.Argument(help="the region to inpaint: left,top,right,bottom in pixels of the image")],
    caption: Annotated[str, typer.Argument(help="what the whole image shows then")],
) -> None:
    """Inpaint: generate the inside of a box of an image again."""
    region = parse_box(box, "box")
    call.run("infill", [open_image(image)], [region], [caption])


@text_command
def upscale(
    image: ImageFile,
    out: Annotated[Path, typer.Option(help="PNG file to write")] = DEFAULT_OUT,
    model: Model = CHAMPION,
) -> None:
    """Enlarge an image with the model's upscaler."""
    check_out(out)
    [enlarged] = load_generator(model).upscale([open_image(image)])
    enlarged.save(out)
    print(f"{out}: {enlarged.width} x {enlarged.height}")


# --- texts -----------------------------------------------------------------------------------------------------------


@text_command
def infill_text(
    texts: Annotated[list[str], typer.Argument(help="texts with ___ for each blank")],
    image: Annotated[Path | None, typer.Option(help="an image that the texts are about")] = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    model: Model = CHAMPION,
) -> None:
    """Fill the blanks of texts, a line for each."""
    images = None if image is None else [open_image(image)] * len(texts)
    for filled in load_generator(model).infill_text(texts, images, temperature=temperature, seed=seed):
        print(filled.text)


@text_command
def caption(
    images: ImageFiles,
    long: Annotated[bool, typer.Option("--long", hidden=True)] = False,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    model: Model = CHAMPION,
) -> None:
    """Describe images, a line for each."""
    if long:
        notice("'cm3leon caption --long' is now 'cm3leon long-caption'")
    describe("long_caption" if long else "caption", images, temperature, seed, model)


@text_command
def long_caption(images: ImageFiles, temperature: Temperature = 0.0, seed: Seed = 0, model: Model = CHAMPION) -> None:
    """Describe images in detail, a line for each."""
    describe("long_caption", images, temperature, seed, model)


def describe(task: str, images: list[Path], temperature: float, seed: int, model: str) -> None:
    """Print a caption of each image, after the file's name if there are several."""
    opened = [open_image(path) for path in images]
    captions = getattr(load_generator(model), task)(opened, temperature=temperature, seed=seed)
    for path, found in zip(images, captions, strict=True):
        print(found.text if len(images) == 1 else f"{path}: {found.text}")


@text_command
def vqa(
    image: ImageFile,
    questions: Annotated[list[str], typer.Argument(help="questions about it")],
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    model: Model = CHAMPION,
) -> None:
    """Answer questions about an image, a line for each."""
    opened = open_image(image)
    for answer in load_generator(model).vqa([opened] * len(questions), questions, temperature=temperature, seed=seed):
        print(answer.text)


@text_command
def reasoning(
    image: ImageFile,
    question: Annotated[str, typer.Argument(help="about it")],
    options: Annotated[list[str], typer.Option("--option", help="an answer to choose from; give at least two")],
    context: Annotated[str, typer.Option(help="facts that the image does not show")] = "",
    explain: Annotated[bool, typer.Option(help="with the reasons before the answer")] = True,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    model: Model = CHAMPION,
) -> None:
    """Answer a question about an image with one of several options, with the reasons first."""
    problem = [open_image(image)], [question], [options], [context]
    [answer] = load_generator(model).reasoning(*problem, explain=explain, temperature=temperature, seed=seed)
    print(answer.text)


# --- documents and pairs ---------------------------------------------------------------------------------------------


@text_command
def interleave(
    parts: Annotated[list[str], typer.Argument(help="the document so far: texts, and names of image files")],
    segments: Annotated[int, typer.Option(min=1, help="texts and images to add, at most")] = 2,
    out: Annotated[Path, typer.Option(help="PNG file for the first image generated, the others OUT-2 ...")] = DEFAULT_OUT,
    seed: Seed = 0,
    temperature: Annotated[float | None, setting_option("temperature")] = None,
    top_p: Annotated[float | None, setting_option("top_p")] = None,
    top_k: Annotated[int | None, setting_option("top_k")] = None,
    changes: Changes = None,
    model: Model = CHAMPION,
) -> None:
    """Continue a document of texts and images in turn."""
    from cm3leon.generation.results import GeneratedImage

    check_out(out)
    settings = decoding_changes(changes, {"temperature": temperature, "top_p": top_p, "top_k": top_k})
    document = [open_image(Path(part)) if Path(part).is_file() else part for part in parts]
    [whole] = load_generator(model).interleave([document], segments, seed=seed, **settings)
    count = 0
    for part in whole[len(parts) :]:
        if not isinstance(part, GeneratedImage):
            print(part)
            continue
        count += 1
        file = numbered(out, count)
        part.save(file)
        print(f"{file}: seed {part.seed}")


@text_command
def score(
    image: ImageFile,
    texts: Annotated[list[str], typer.Argument(help="texts to score with the image")],
    model: Model = CHAMPION,
) -> None:
    """Log-likelihoods of an image and each text together, nats."""
    opened = open_image(image)
    for text, found in zip(texts, load_generator(model).score([opened] * len(texts), texts), strict=True):
        print(f"{text}: text given image {found.text:.3f}, image given text {found.image:.3f}")


former("generate", "text-to-image", text_to_image)
former("ask", "vqa", vqa)
former("answer", "vqa", vqa)
former("reason", "reasoning", reasoning)


# --- the server ------------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=PANEL)
def serve(
    model: Model = CHAMPION,
    host: Annotated[str, typer.Option(help="address to listen on; there is no authentication")] = "127.0.0.1",
    port: int = 8000,
    precision: Annotated[
        Literal["float32", "bfloat16", "int8"] | None,
        typer.Option(help="of the weights; by default bfloat16 on a GPU, else float32"),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="compile decoding, while the first requests wait")] = False,
) -> None:
    """Answer over HTTP: OpenAI's images endpoint, one for each task, and a page at /; until Ctrl-C."""
    from cm3leon.serving.server import run

    run(model, host, port, precision=precision, compiled=compiled)
