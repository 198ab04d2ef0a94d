"""The requests of the HTTP interface, one class a task."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from cm3leon.serving.errors import ApiError
from cm3leon.serving.schemas import (
    COMMON,
    MAX_CHARACTERS,
    Box,
    Drawing,
    Guided,
    Picture,
    Retrieved,
    Seeded,
    TaskRequest,
    Text,
    Writing,
    read_image,
)

MAX_UPSCALED_SIDE = 1024


class TextToImage(Retrieved):
    """Draw a prompt."""

    task, apart = "text_to_image", COMMON | {"prompt"}
    prompt: Text

    def item(self) -> tuple[Any, ...]:
        return (self.prompt,)


class Write(Retrieved):
    """Draw a text as writing."""

    task, apart = "write", COMMON | {"text"}
    text: Text

    def item(self) -> tuple[Any, ...]:
        return (self.text,)


class LaidOutObject(BaseModel):
    """An object and where it is to be drawn."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    label: Annotated[Text, StringConstraints(max_length=200)]
    box: Box


class LayoutToImage(Retrieved):
    """Draw a prompt with objects at places, in pixels of the image to draw."""

    task, apart = "layout_to_image", COMMON | {"prompt", "objects"}
    prompt: Text
    objects: list[LaidOutObject] = Field(min_length=1, max_length=16)

    def item(self) -> tuple[Any, ...]:
        return self.prompt, [(placed.label, tuple(placed.box)) for placed in self.objects]


class ConditionToImage(Guided):
    """Draw a prompt over the structure that an image shows."""

    task, apart = "condition_to_image", COMMON | {"prompt", "image", "kind"}
    prompt: Text
    image: Picture
    kind: str = Field(max_length=40, description="what the image shows: 'canny edge', 'segmentation map' ...")

    def item(self) -> tuple[Any, ...]:
        return self.prompt, read_image(self.image, "image"), self.kind


class Edit(Guided):
    """Change an image as an instruction says."""

    task, apart = "edit", COMMON | {"image", "instruction"}
    image: Picture
    instruction: Text
    image_guidance: float | None = Field(None, ge=0, le=50, description="guidance towards the image that is edited")

    def item(self) -> tuple[Any, ...]:
        return read_image(self.image, "image"), self.instruction


class Infill(Drawing):
    """Draw anew what is inside a box of an image, in pixels of that image."""

    task, apart = "infill", COMMON | {"image", "box", "prompt"}
    image: Picture
    box: Box
    prompt: Text

    def item(self) -> tuple[Any, ...]:
        return read_image(self.image, "image"), tuple(self.box), self.prompt


class Caption(Writing):
    """Describe an image."""

    task, apart = "caption", frozenset({"model", "image"})
    image: Picture
    long: bool = Field(False, description="at length")

    def item(self) -> tuple[Any, ...]:
        return (read_image(self.image, "image"),)


class Answer(Writing):
    """Answer a question about an image."""

    task, apart = "answer", frozenset({"model", "image", "question"})
    image: Picture
    question: Text

    def item(self) -> tuple[Any, ...]:
        return read_image(self.image, "image"), self.question


class Reason(Writing):
    """Answer a question about an image with one of several options, and say why."""

    task, apart = "reason", frozenset({"model", "image", "question", "options", "context"})
    image: Picture
    question: Text
    options: list[Annotated[Text, StringConstraints(max_length=200)]] = Field(min_length=2, max_length=16)
    context: Annotated[str, StringConstraints(max_length=MAX_CHARACTERS)] = ""
    explain: bool = Field(True, description="with the reasons before the answer")

    def item(self) -> tuple[Any, ...]:
        return read_image(self.image, "image"), self.question, self.options, self.context


class InfillText(Writing):
    """Fill the blanks of a text, which may be about an image."""

    task, apart = "infill_text", frozenset({"model", "text", "image"})
    text: Text = Field(description="with ___ for each blank")
    image: Picture | None = None

    def item(self) -> tuple[Any, ...]:
        return (self.text,) if self.image is None else (self.text, read_image(self.image, "image"))


class Segment(BaseModel):
    """A part of a document: a text or an image."""

    model_config = ConfigDict(extra="forbid")
    text: Text | None = None
    image: Picture | None = None

    @model_validator(mode="after")
    def one_of_both(self) -> Self:
        if (self.text is None) == (self.image is None):
            raise ValueError('give {"text": ...} or {"image": ...}')
        return self


class Interleave(Seeded):
    """Continue a document of texts and images."""

    task, apart = "interleave", frozenset({"model", "document"})
    document: list[Segment] = Field(min_length=1, max_length=16)
    segments: int = Field(2, ge=1, le=8, description="texts and images to add, at most")
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)

    def item(self) -> tuple[Any, ...]:
        parts = enumerate(self.document)
        return ([part.text if part.image is None else read_image(part.image, f"document.{number}.image") for number, part in parts],)


class Score(TaskRequest):
    """How likely an image and a text are together."""

    task, apart = "score", frozenset({"model", "image", "text"})
    image: Picture
    text: Text

    def item(self) -> tuple[Any, ...]:
        return read_image(self.image, "image"), self.text


class Upscale(TaskRequest):
    """Enlarge an image with the model's upscaler."""

    task, apart = "upscale", frozenset({"model", "image"})
    image: Picture

    def item(self) -> tuple[Any, ...]:
        image = read_image(self.image, "image")
        if max(image.size) > MAX_UPSCALED_SIDE:
            message = f"image: {image.width}x{image.height} pixels, at most {MAX_UPSCALED_SIDE} a side are enlarged"
            raise ApiError(400, message, param="image", code="image")
        return (image,)


TASKS: tuple[type[TaskRequest], ...] = (
    Caption, Answer, Reason, Edit, Infill, InfillText, LayoutToImage, ConditionToImage, Write, Interleave, Score, Upscale,
)  # fmt: skip
"""Those with an address ``/v1/tasks/{task}``."""
