"""The commands that use a trained model: one for each task, and ``serve``.

Heavy packages are imported inside the commands.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cm3leon.cli import options as shared
from cm3leon.cli.options import (
    CHAMPION,
    DEFAULT_OUT,
    PANEL,
    Changes,
    ImageCall,
    ImageFile,
    ImageFiles,
    Model,
    Seed,
    Temperature,
    UsageError,
    check_out,
    decoding_changes,
    former,
    image_command,
    keeping,
    names_image,
    notice,
    numbered,
    open_image,
    parse_box,
    setting_option,
    text_command,
)
from cm3leon.cli.options import app as app  # explicit, because cli/app.py adds model.app

if TYPE_CHECKING:
    from PIL import Image

TOGETHER = 32
"""Images that are opened and described at a time: those before one that cannot be read are printed, and few are in memory."""

# --- images ----------------------------------------------------------------------------------------------------------


@image_command
def text_to_image(
    call: ImageCall,
    prompts: Annotated[list[str], typer.Argument(help="what the images show")],
    reference: Annotated[Path | None, typer.Option(help="an image to retrieve documents by too; with --retrieved-documents")] = None,
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
    [enlarged] = shared.load_generator(model).upscale([open_image(image)])
    enlarged.save(out)
    print(f"{out}: {enlarged.width} x {enlarged.height}")


# --- texts -----------------------------------------------------------------------------------------------------------


@text_command
def infill_text(
    texts: Annotated[list[str], typer.Argument(help="texts with ___ (three or more) for each blank")],
    image: Annotated[Path | None, typer.Option(help="an image that the texts are about")] = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    model: Model = CHAMPION,
) -> None:
    """Fill the blanks of texts, a line for each."""
    images = None if image is None else [open_image(image)] * len(texts)
    for filled in shared.load_generator(model).infill_text(texts, images, temperature=temperature, seed=seed):
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
    """Print a caption of each image, after the file's name if there are several; those of :data:`TOGETHER` at a time."""
    generator = None
    for start in range(0, len(images), TOGETHER):
        opened: list[tuple[Path, Image.Image]] = []
        failure = None
        for path in images[start : start + TOGETHER]:
            try:
                image = open_image(path)
            except (UsageError, OSError) as error:
                failure = error
                break
            opened.append((path, image))
        if opened:
            generator = generator or shared.load_generator(model)
            captions = getattr(generator, task)([image for _, image in opened], temperature=temperature, seed=seed)
            for (path, _), found in zip(opened, captions, strict=True):
                print(found.text if len(images) == 1 else f"{path}: {found.text}", flush=True)
        if failure:
            raise failure


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
    for answer in shared.load_generator(model).vqa([opened] * len(questions), questions, temperature=temperature, seed=seed):
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
    [answer] = shared.load_generator(model).reasoning(*problem, explain=explain, temperature=temperature, seed=seed)
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
    """Continue a document of texts and images in turn. Each is printed or written as soon as it is there."""
    from cm3leon.generation.results import GeneratedImage

    check_out(out)
    settings = decoding_changes(changes, {"temperature": temperature, "top_p": top_p, "top_k": top_k})
    document = [open_image(Path(part)) if names_image(part) else part for part in parts]
    generator = shared.load_generator(model)
    files: list[str] = []
    texts = 0
    with keeping(lambda: _generated_before(files, texts)):
        for part in generator.continued(document, segments, seed=seed, **settings):
            if not isinstance(part, GeneratedImage):
                print(part, flush=True)
                texts += 1
                continue
            file = numbered(out, len(files) + 1)
            part.save(file)
            files.append(str(file))
            print(f"{file}: seed {part.seed}", flush=True)


def _generated_before(files: list[str], texts: int) -> str:
    found = ", ".join([*files, *(["what is printed above"] if texts else [])])
    return f"generated before: {found}" if found else ""


@text_command
def score(
    image: ImageFile,
    texts: Annotated[list[str], typer.Argument(help="texts to score with the image")],
    model: Model = CHAMPION,
) -> None:
    """Log-likelihoods of an image and each text together, nats."""
    opened = open_image(image)
    for text, found in zip(texts, shared.load_generator(model).score([opened] * len(texts), texts), strict=True):
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
    port: Annotated[int, typer.Option(min=1, max=65_535)] = 8000,
    precision: Annotated[
        Literal["float32", "bfloat16", "int8"] | None,
        typer.Option(help="of the weights; by default bfloat16 on a GPU, else float32"),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="compile decoding, while the first requests wait")] = False,
    follow: Annotated[
        float, typer.Option(min=0, help="seconds between looks whether the alias names another version, which is then served; 0: never")
    ] = 30.0,
) -> None:
    """Answer over HTTP: OpenAI's images endpoint, one for each task, and a page at /; until Ctrl-C."""
    from cm3leon.serving.server import run

    run(model, host, port, precision=precision, compiled=compiled, follow_seconds=follow)
