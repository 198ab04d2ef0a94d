"""The requests of the HTTP interface, one class a task."""

from __future__ import annotations

from typing import Annotated, Any, Self

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.json_schema import SkipJsonSchema

from cm3leon.generation.generator import Generator
from cm3leon.generation.settings import decoding_field
from cm3leon.generation.task_names import GENERATOR_TASKS
from cm3leon.serving.calls import Call
from cm3leon.serving.errors import ApiError
from cm3leon.serving.schemas import (
    MAX_CHARACTERS,
    MAX_PIXELS,
    EncodedImage,
    GuidedImageRequest,
    ImageRequest,
    PixelBox,
    RetrievingImageRequest,
    SeededRequest,
    TaskRequest,
    Text,
    TextRequest,
    read_image,
)

MAX_UPSCALED_SIDE = 1024


class TextToImage(RetrievingImageRequest):
    """Generate images of a prompt."""

    task, item_fields = "text_to_image", frozenset({"prompt"})
    prompt: Text

    def item(self, side: int) -> tuple[Any, ...]:
        return (self.prompt,)


class Write(RetrievingImageRequest):
    """Generate images of a text as writing."""

    task, item_fields = "write", frozenset({"text"})
    text: Text

    def item(self, side: int) -> tuple[Any, ...]:
        return (self.text,)


class LaidOutObject(BaseModel):
    """An object of a layout and its box."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    label: Annotated[Text, StringConstraints(max_length=200)]
    box: PixelBox


class LayoutToImage(RetrievingImageRequest):
    """Generate images of a prompt with objects inside boxes, in pixels of the generated image."""

    task, item_fields = "layout_to_image", frozenset({"prompt", "objects"})
    prompt: Text
    objects: list[LaidOutObject] = Field(min_length=1, max_length=16)

    def item(self, side: int) -> tuple[Any, ...]:
        return self.prompt, [(laid_out.label, tuple(laid_out.box)) for laid_out in self.objects]


class ConditionToImage(GuidedImageRequest):
    """Generate images of a prompt with the structure that a condition image shows."""

    task, item_fields = "condition_to_image", frozenset({"prompt", "image", "kind"})
    prompt: Text
    image: EncodedImage
    kind: str = Field(max_length=40, description="of the condition image: 'canny edge', 'segmentation map' ...")

    def item(self, side: int) -> tuple[Any, ...]:
        return self.prompt, read_image(self.image, "image", side), self.kind


class Edit(GuidedImageRequest):
    """Change an image as an instruction says."""

    task, item_fields = "edit", frozenset({"image", "instruction"})
    image: EncodedImage
    instruction: Text
    image_guidance: float | None = decoding_field("image_guidance")

    def item(self, side: int) -> tuple[Any, ...]:
        return read_image(self.image, "image", side), self.instruction


class Infill(ImageRequest):
    """Inpaint: generate the inside of a box of an image again, in pixels of that image."""

    task, item_fields = "infill", frozenset({"image", "box", "prompt"})
    image: EncodedImage
    box: PixelBox
    prompt: Text

    def item(self, side: int) -> tuple[Any, ...]:
        return read_image(self.image, "image"), tuple(self.box), self.prompt


class InfillText(TextRequest):
    """Fill the blanks of a text, which may be about an image."""

    task, item_fields = "infill_text", frozenset({"text", "image"})
    text: Text = Field(description="with ___ (three or more) for each blank")
    image: EncodedImage | None = None

    def item(self, side: int) -> tuple[Any, ...]:
        return (self.text,) if self.image is None else (self.text, read_image(self.image, "image", side))


class LongCaption(TextRequest):
    """Describe an image in detail."""

    task, item_fields = "long_caption", frozenset({"image"})
    image: EncodedImage

    def item(self, side: int) -> tuple[Any, ...]:
        return (read_image(self.image, "image", side),)


class Caption(TextRequest):
    """Describe an image."""

    task, item_fields = "caption", frozenset({"image", "long"})
    image: EncodedImage
    long: SkipJsonSchema[bool] = False
    """Requests of earlier versions ask for a long caption by it."""

    def item(self, side: int) -> tuple[Any, ...]:
        return (read_image(self.image, "image", side),)

    @property
    def is_deprecated(self) -> bool:
        return "long" in self.model_fields_set

    def call(self, generator: Generator) -> Call:
        if self.long:
            return LongCaption(**self.model_dump(exclude={"long"})).call(generator)
        return super().call(generator)


class Vqa(TextRequest):
    """Answer a question about an image."""

    task, item_fields = "vqa", frozenset({"image", "question"})
    image: EncodedImage
    question: Text

    def item(self, side: int) -> tuple[Any, ...]:
        return read_image(self.image, "image", side), self.question


class Reasoning(TextRequest):
    """Answer a question about an image with one of several options, with the reasons first."""

    task, item_fields = "reasoning", frozenset({"image", "question", "options", "context"})
    image: EncodedImage
    question: Text
    options: list[Annotated[Text, StringConstraints(max_length=200)]] = Field(min_length=2, max_length=16)
    context: Annotated[str, StringConstraints(max_length=MAX_CHARACTERS)] = ""
    explain: bool = Field(True, description="with the reasons before the answer")

    def item(self, side: int) -> tuple[Any, ...]:
        return read_image(self.image, "image", side), self.question, self.options, self.context


class DocumentPart(BaseModel):
    """A text or an image of a document."""

    model_config = ConfigDict(extra="forbid")
    text: Text | None = None
    image: EncodedImage | None = None

    @model_validator(mode="after")
    def exactly_one(self) -> Self:
        if (self.text is None) == (self.image is None):
            raise ValueError('give {"text": ...} or {"image": ...}')
        return self


class Interleave(SeededRequest):
    """Continue a document of texts and images in turn."""

    task, item_fields = "interleave", frozenset({"document"})
    document: list[DocumentPart] = Field(min_length=1, max_length=16)
    segments: int = Field(2, ge=1, le=8, description="texts and images to add, at most")
    temperature: float | None = decoding_field("temperature")
    top_p: float | None = decoding_field("top_p")
    top_k: int | None = decoding_field("top_k")

    def item(self, side: int) -> tuple[Any, ...]:
        document: list[str | Image.Image | None] = []
        pixels = 0
        for number, part in enumerate(self.document):
            document.append(part.text if part.image is None else read_image(part.image, f"document.{number}.image"))
            if isinstance(image := document[-1], Image.Image) and (pixels := pixels + image.width * image.height) > MAX_PIXELS:
                message = f"document: its images have more than {MAX_PIXELS} pixels together; send smaller images"
                raise ApiError(400, message, param="document", code="image")
        return (document,)


class Score(TaskRequest):
    """The log-likelihoods of an image and a text together."""

    task, item_fields = "score", frozenset({"image", "text"})
    image: EncodedImage
    text: Text

    def item(self, side: int) -> tuple[Any, ...]:
        return read_image(self.image, "image", side), self.text


class Upscale(TaskRequest):
    """Enlarge an image with the model's upscaler."""

    task, item_fields = "upscale", frozenset({"image"})
    image: EncodedImage

    def item(self, side: int) -> tuple[Any, ...]:
        image = read_image(self.image, "image")
        if max(image.size) > MAX_UPSCALED_SIDE:
            message = f"image: {image.width}x{image.height} pixels, at most {MAX_UPSCALED_SIDE} a side are enlarged"
            raise ApiError(400, message, param="image", code="image")
        return (image,)


_ALL: tuple[type[TaskRequest], ...] = (
    TextToImage, Write, LayoutToImage, ConditionToImage, Edit, Infill, InfillText,
    Caption, LongCaption, Vqa, Reasoning, Interleave, Score, Upscale,
)  # fmt: skip
REQUESTS = dict(zip(GENERATOR_TASKS, _ALL, strict=True))
"""Task -> its request."""
