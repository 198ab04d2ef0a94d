"""The generator's results as JSON."""

from __future__ import annotations

import base64
import io
import time
from dataclasses import asdict
from typing import Any

from PIL import Image

from cm3leon.generation.checks import HOW_TO_TUNE
from cm3leon.generation.generator import Generator
from cm3leon.generation.results import DocumentPart, GeneratedImage, GeneratedText, PairScore
from cm3leon.generation.task_names import GENERATOR_TASKS
from cm3leon.sequence.tasks import TASKS
from cm3leon.serving.schemas import MAX_GENERATED, MAX_IMAGE_BYTES, MAX_IMAGES, MAX_PIXELS, sizes


def png(image: GeneratedImage | Image.Image) -> str:
    """An image as base64 PNG; one that was generated has its record in the file's metadata."""
    stream = io.BytesIO()
    if isinstance(image, GeneratedImage):
        image.save(stream)
    else:
        image.save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def generated_image(image: GeneratedImage) -> dict[str, Any]:
    """An image with its seed, its CLIP score and the retrieved documents."""
    return {"b64_json": png(image), "seed": image.seed, "score": image.score, "retrieved_documents": image.retrieved_documents}


def body(result: Any) -> dict[str, Any]:
    """The generator's result for one item as the body of an answer."""
    if isinstance(result, GeneratedText):
        return {"text": result.text, "seed": result.seed}
    if isinstance(result, PairScore):
        return asdict(result)
    if isinstance(result, Image.Image):
        return {"created": int(time.time()), "data": [{"b64_json": png(result)}]}
    if all(isinstance(part, GeneratedImage) for part in result):
        return {"created": int(time.time()), "data": [generated_image(image) for image in result]}
    return {"document": [document_part(part) for part in result]}


def document_part(part: DocumentPart) -> dict[str, Any]:
    """A text or image of a document in the form of a request; one that was generated has its seed too."""
    seed = {"seed": part.seed} if isinstance(part, GeneratedText | GeneratedImage) else {}
    return {"text": str(part), **seed} if isinstance(part, str | GeneratedText) else {"image": png(part), **seed}


def describe(generator: Generator) -> dict[str, Any]:
    """The abilities of a model: for each task null, or why it cannot do it; sizes of images, decoding defaults, limits."""
    tasks: dict[str, str | None] = dict.fromkeys(GENERATOR_TASKS)
    for name in set(TASKS) - generator.trained_tasks:
        tasks[name] = f"this model was not tuned for {name}; {HOW_TO_TUNE}"
    if generator.super_resolution is None:
        tasks["upscale"] = "this model has no upscaler; run the stage super_resolution"
    return {
        "tasks": tasks,
        "image_size": generator.image_size,
        "sizes": sizes(generator),
        "decoding": generator.decoding.model_dump(),
        "limits": {"images": MAX_IMAGES, "generated": MAX_GENERATED, "image_bytes": MAX_IMAGE_BYTES, "pixels": MAX_PIXELS},
    }
