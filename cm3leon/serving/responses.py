"""The generator's results as JSON."""

from __future__ import annotations

import base64
import io
import time
from dataclasses import asdict
from typing import Any

from PIL import Image

from cm3leon.generation.generator import Generator
from cm3leon.generation.results import GeneratedImage, GeneratedText, PairScore, Part
from cm3leon.serving.schemas import MAX_DRAWN, MAX_IMAGE_BYTES, MAX_IMAGES, MAX_PIXELS, sizes


def png(image: GeneratedImage | Image.Image) -> str:
    """An image as base64 PNG; one that was generated has its record in the file's metadata."""
    stream = io.BytesIO()
    if isinstance(image, GeneratedImage):
        image.save(stream)
    else:
        image.save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def drawn(image: GeneratedImage) -> dict[str, Any]:
    """An image with what it came from; what a retrieved document does not tell is null."""
    neighbors = [{name: None if value != value else value for name, value in found.items()} for found in image.neighbors]
    return {"b64_json": png(image), "seed": image.seed, "score": image.score, "neighbors": neighbors}


def body(result: Any) -> dict[str, Any]:
    """What the generator returned for one item, as the body of an answer."""
    if isinstance(result, GeneratedText):
        return {"text": result.text, "seed": result.seed}
    if isinstance(result, PairScore):
        return asdict(result)
    if isinstance(result, Image.Image):
        return {"created": int(time.time()), "data": [{"b64_json": png(result)}]}
    if all(isinstance(part, GeneratedImage) for part in result):
        return {"created": int(time.time()), "data": [drawn(image) for image in result]}
    return {"document": [part_of_document(part) for part in result]}


def part_of_document(part: Part) -> dict[str, Any]:
    """A part as a request would give it; of what was generated its seed too."""
    seed = {"seed": part.seed} if isinstance(part, GeneratedText | GeneratedImage) else {}
    return {"text": str(part), **seed} if isinstance(part, str | GeneratedText) else {"image": png(part), **seed}


NEEDED = {
    "text_to_image": "text_to_image", "write": "write", "layout_to_image": "layout_to_image", "condition_to_image": "condition_to_image",
    "edit": "edit", "caption": "caption", "long_caption": "long_caption", "answer": "vqa", "reason": "reasoning",
    "infill": None, "infill_text": None, "interleave": None, "score": None,
}  # fmt: skip
"""What is asked of a model -> the task of instruction tuning without which it cannot; the others come with pretraining."""


def describe(generator: Generator) -> dict[str, Any]:
    """What a model can do: for each task why it cannot, or null; sizes of images, decoding defaults, limits."""
    tasks: dict[str, str | None] = {}
    for name, needed in NEEDED.items():
        trained = needed is None or needed in generator.trained_tasks
        tasks[name] = None if trained else f"this model was not tuned for {needed}; add it to sft.tasks and train again"
    tasks["upscale"] = None if generator.super_resolution is not None else "this model has no upscaler; run the stage super_resolution"
    return {
        "tasks": tasks,
        "image_size": generator.image_size,
        "sizes": sizes(generator),
        "decoding": generator.decoding.model_dump(),
        "limits": {"images": MAX_IMAGES, "drawn": MAX_DRAWN, "image_bytes": MAX_IMAGE_BYTES, "pixels": MAX_PIXELS},
    }
