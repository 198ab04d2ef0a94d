"""The commands that use a trained model: draw, describe, answer, edit, infill, score, serve.

Their names are those of :class:`~cm3leon.generation.generator.Generator`'s methods. Heavy packages are imported inside the commands.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cm3leon.utils.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from cm3leon.generation.generator import Generator
    from cm3leon.generation.results import GeneratedImage
    from cm3leon.sequence.tasks import Box

CHAMPION = "models:/cm3leon@champion"
PANEL = "Model"

app = typer.Typer()


class UsageError(UserError):
    """A command was given something it cannot use; the message says what to change."""


def command(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command under its names; one with underscores also with hyphens, unlisted."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for name in names:
            app.command(name, rich_help_panel=PANEL)(function)
            if "_" in name:
                app.command(name.replace("_", "-"), hidden=True)(function)
        return function

    return register


Model = Annotated[str, typer.Option(help="a registered model (models:/NAME@ALIAS) or a bundle directory")]
Seed = Annotated[int, typer.Option(help="the same seed draws the same")]
Out = Annotated[Path, typer.Option(help="PNG file to write, of the best image")]
Count = Annotated[int, typer.Option(min=1, help="how many; the best is OUT, the others OUT-2, OUT-3 ...")]
ImageFile = Annotated[Path, typer.Argument(help="image file")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="a decoding setting, name=value, instead of the model's own; can be given several times")
]
Guidance = Annotated[float | None, typer.Option(help="classifier-free guidance scale; 1: none")]
Temperature = Annotated[float, typer.Option(help="0: the likeliest text")]
Upscale = Annotated[bool, typer.Option("--upscale", help="enlarge what was drawn with the model's upscaler")]
DEFAULT_OUT = Path("out.png")


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
    """Raises :class:`UsageError` or :class:`FileNotFoundError` unless ``out`` can be written as PNG; before anything is drawn."""
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: images are written as PNG; give a name that ends in .png")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no directory {out.parent}")


def settings_of(changes: list[str] | None, **named: Any) -> dict[str, Any]:
    """Decoding settings from ``name=value`` texts and named options; options that were not given are left out.

    Raises:
        UsageError: for a text without ``=``.
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
    return found


def box_of(text: str, what: str) -> Box:
    """A box from ``left,top,right,bottom``.

    Raises:
        UsageError: if it is something else.
    """
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{what} {text!r}: write it as left,top,right,bottom, pixels with commas between them") from None
    return left, top, right, bottom


def finish(generator: Generator, drawn: list[list[GeneratedImage]], out: Path, *, upscale: bool, show_neighbors: bool = False) -> None:
    """Write the images, each a PNG with what made it in its metadata, and say where; of several prompts as ``out-p1.png`` ..."""
    for number, images in enumerate(drawn, 1):
        first = out if len(drawn) == 1 else out.with_name(f"{out.stem}-p{number}{out.suffix}")
        if upscale:
            for image, enlarged in zip(images, generator.upscale([image.image for image in images]), strict=True):
                image.image, image.settings = enlarged, {**image.settings, "upscale": True}
        for place, image in enumerate(images, 1):
            file = first if place == 1 else first.with_name(f"{first.stem}-{place}{first.suffix}")
            image.save(file)
            print(f"{file}: seed {image.seed}" + ("" if image.score is None else f", CLIP score {image.score:.3f}"))
        for neighbor in images[0].neighbors:
            credit = ", ".join(str(neighbor[key]) for key in ("licence", "attribution") if neighbor.get(key))
            print(f"retrieved: {neighbor['id']} ({credit})")
            if show_neighbors:
                print(f"    {neighbor['caption']!r}, score {neighbor['score']:.3f}, source {neighbor['source']}")


@command("text_to_image", "generate")
def text_to_image(
    prompts: Annotated[list[str], typer.Argument(help="what to draw")],
    num_images: Count = 1,
    out: Out = DEFAULT_OUT,
    seed: Seed = 0,
    guidance: Guidance = None,
    temperature: float | None = None,
    top_p: float | None = None,
    candidates: Annotated[int | None, typer.Option(help="images drawn for each one kept")] = None,
    likelihood: Annotated[float | None, typer.Option(help="weight of the caption's likelihood beside the CLIP score in ranking")] = None,
    retrieved_documents: Annotated[int | None, typer.Option(help="retrieved documents before the prompt")] = None,
    reference: Annotated[Path | None, typer.Option(help="an image by which documents are retrieved too")] = None,
    show_neighbors: Annotated[bool, typer.Option("--show-neighbors", help="say more of the retrieved documents")] = False,
    upscale: Upscale = False,
    settings: Settings = None,
    model: Model = CHAMPION,
) -> None:
    """Draw prompts. Settings not given are the model's own."""
    check_out(out)
    references = None if reference is None else [open_image(reference)] * len(prompts)
    given = {"guidance": guidance, "temperature": temperature, "top_p": top_p, "candidates": candidates}
    given |= {"likelihood": likelihood, "retrieved_documents": retrieved_documents}
    generator = load_generator(model)
    drawn = generator.text_to_image(prompts, num_images, references=references, seed=seed, **settings_of(settings, **given))
    finish(generator, drawn, out, upscale=upscale, show_neighbors=show_neighbors)


@command("write")
def write(
    texts: Annotated[list[str], typer.Argument(help="what is to be written in the image")],
    num_images: Count = 1,
    out: Out = DEFAULT_OUT,
    seed: Seed = 0,
    upscale: Upscale = False,
    settings: Settings = None,
    model: Model = CHAMPION,
) -> None:
    """Draw texts as writing."""
    check_out(out)
    generator = load_generator(model)
    finish(generator, generator.write(texts, num_images, seed=seed, **settings_of(settings)), out, upscale=upscale)


@command("layout_to_image")
def layout_to_image(
    caption: Annotated[str, typer.Argument(help="what to draw")],
    objects: Annotated[list[str], typer.Option("--object", help="label=left,top,right,bottom in pixels of the image; several times")],
    num_images: Count = 1,
    out: Out = DEFAULT_OUT,
    seed: Seed = 0,
    upscale: Upscale = False,
    settings: Settings = None,
    model: Model = CHAMPION,
) -> None:
    """Draw a caption with objects at places."""
    check_out(out)
    layout = []
    for placed in objects:
        label, equals, box = placed.rpartition("=")
        if not equals:
            raise UsageError(f"--object {placed}: write it as label=left,top,right,bottom")
        layout.append((label, box_of(box, f"--object {label}:")))
    generator = load_generator(model)
    drawn = generator.layout_to_image([caption], [layout], num_images, seed=seed, **settings_of(settings))
    finish(generator, drawn, out, upscale=upscale)


@command("condition_to_image")
def condition_to_image(
    caption: Annotated[str, typer.Argument(help="what to draw")],
    image: ImageFile,
    kind: Annotated[str, typer.Option(help="what the image shows: 'canny edge', 'segmentation map' ...; an unknown one lists all")],
    num_images: Count = 1,
    out: Out = DEFAULT_OUT,
    seed: Seed = 0,
    upscale: Upscale = False,
    settings: Settings = None,
    model: Model = CHAMPION,
) -> None:
    """Draw a caption over the structure that an image shows."""
    check_out(out)
    opened, generator = open_image(image), load_generator(model)
    drawn = generator.condition_to_image([caption], [opened], [kind], num_images, seed=seed, **settings_of(settings))
    finish(generator, drawn, out, upscale=upscale)


@command("edit")
def edit(
    image: ImageFile,
    instruction: Annotated[str, typer.Argument(help="what to change")],
    num_images: Count = 1,
    out: Out = DEFAULT_OUT,
    seed: Seed = 0,
    guidance: Annotated[float | None, typer.Option(help="towards the instruction")] = None,
    image_guidance: Annotated[float | None, typer.Option(help="towards the image that is edited")] = None,
    upscale: Upscale = False,
    settings: Settings = None,
    model: Model = CHAMPION,
) -> None:
    """Change an image as an instruction says."""
    check_out(out)
    opened, generator = open_image(image), load_generator(model)
    given = settings_of(settings, guidance=guidance, image_guidance=image_guidance)
    finish(generator, generator.edit([opened], [instruction], num_images, seed=seed, **given), out, upscale=upscale)


@command("infill")
def infill(
    image: ImageFile,
    box: Annotated[str, typer.Argument(help="what to draw anew: left,top,right,bottom in pixels of the image")],
    caption: Annotated[str, typer.Argument(help="what the whole image is to show")],
    num_images: Count = 1,
    out: Out = DEFAULT_OUT,
    seed: Seed = 0,
    upscale: Upscale = False,
    settings: Settings = None,
    model: Model = CHAMPION,
) -> None:
    """Draw anew what is inside a box of an image."""
    check_out(out)
    place = box_of(box, "box")
    opened, generator = open_image(image), load_generator(model)
    drawn = generator.infill([opened], [place], [caption], num_images, seed=seed, **settings_of(settings))
    finish(generator, drawn, out, upscale=upscale)


@command("infill_text")
def infill_text(
    texts: Annotated[list[str], typer.Argument(help="texts with ___ for each blank")],
    image: Annotated[Path | None, typer.Option(help="an image that the texts are about")] = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    model: Model = CHAMPION,
) -> None:
    """Fill the blanks of texts, a line for each."""
    images = None if image is None else [open_image(image)] * len(texts)
    for found in load_generator(model).infill_text(texts, images, temperature=temperature, seed=seed):
        print(found.text)


@command("caption")
def caption(
    images: Annotated[list[Path], typer.Argument(help="image files")],
    long: Annotated[bool, typer.Option(help="describe at length")] = False,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    model: Model = CHAMPION,
) -> None:
    """Describe images, a line for each."""
    opened = [open_image(path) for path in images]
    found = load_generator(model).caption(opened, long=long, temperature=temperature, seed=seed)
    for path, described in zip(images, found, strict=True):
        print(described.text if len(images) == 1 else f"{path}: {described.text}")


@command("answer", "ask")
def answer(
    image: ImageFile,
    questions: Annotated[list[str], typer.Argument(help="questions about it")],
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    model: Model = CHAMPION,
) -> None:
    """Answer questions about an image, a line for each."""
    opened = open_image(image)
    for found in load_generator(model).answer([opened] * len(questions), questions, temperature=temperature, seed=seed):
        print(found.text)


@command("reason")
def reason(
    image: ImageFile,
    question: Annotated[str, typer.Argument(help="about it")],
    options: Annotated[list[str], typer.Option("--option", help="an answer to choose from; give at least two")],
    context: Annotated[str, typer.Option(help="what is known beside the image")] = "",
    explain: Annotated[bool, typer.Option(help="with the reasons before the answer")] = True,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    model: Model = CHAMPION,
) -> None:
    """Answer a question about an image with one of several options, and say why."""
    given = [open_image(image)], [question], [options], [context]
    [found] = load_generator(model).reason(*given, explain=explain, temperature=temperature, seed=seed)
    print(found.text)


@command("interleave")
def interleave(
    parts: Annotated[list[str], typer.Argument(help="the document so far: texts, and names of image files")],
    segments: Annotated[int, typer.Option(min=1, help="texts and images to add, at most")] = 2,
    out: Annotated[Path, typer.Option(help="PNG file for the first image drawn, the others OUT-2 ...")] = DEFAULT_OUT,
    seed: Seed = 0,
    settings: Settings = None,
    model: Model = CHAMPION,
) -> None:
    """Continue a document of texts and images, in turn."""
    from cm3leon.generation.results import GeneratedImage

    check_out(out)
    document = [open_image(Path(part)) if Path(part).is_file() else part for part in parts]
    [whole] = load_generator(model).interleave([document], segments, seed=seed, **settings_of(settings))
    drawn = 0
    for part in whole[len(parts) :]:
        if not isinstance(part, GeneratedImage):
            print(part)
            continue
        drawn += 1
        file = out if drawn == 1 else out.with_name(f"{out.stem}-{drawn}{out.suffix}")
        part.save(file)
        print(f"{file}: seed {part.seed}")


@command("score")
def score(
    image: ImageFile,
    texts: Annotated[list[str], typer.Argument(help="texts to hold against the image")],
    model: Model = CHAMPION,
) -> None:
    """How likely the model finds an image and each text together, nats."""
    opened = open_image(image)
    for text, found in zip(texts, load_generator(model).score([opened] * len(texts), texts), strict=True):
        print(f"{text}: text given image {found.text:.3f}, image given text {found.image:.3f}")


@command("upscale")
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


@command("serve")
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
