"""What the requests of the HTTP interface have in common: limits, types of fields, and how a request becomes a call of the generator."""

from __future__ import annotations

import base64
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Len
from PIL import Image
from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, StringConstraints, field_validator

from cm3leon.data.images import ImageError, decode
from cm3leon.generation.generator import Generator
from cm3leon.serving.calls import Call
from cm3leon.serving.errors import ApiError

MAX_BODY = 32 * 2**20
MAX_CHARACTERS = 4000
MAX_IMAGE_BYTES = 10 * 2**20
MAX_PIXELS = 25_000_000
MAX_IMAGES = 16
MAX_DRAWN = 64
"""Images drawn for one request: those returned times the candidates for each."""


def filled(text: str) -> str:
    """The text, which must say something."""
    if not text.strip():
        raise ValueError("must not be empty")
    return text


Text = Annotated[str, StringConstraints(max_length=MAX_CHARACTERS), AfterValidator(filled)]
Picture = Annotated[str, Field(description="an image file in base64, with or without 'data:image/png;base64,' before it")]
Box = Annotated[
    list[Annotated[float, Field(ge=0, le=100_000)]],
    Len(4, 4),
    Field(description="left, top, right, bottom in pixels; right and bottom excluded"),
]


def read_image(value: str, param: str) -> Image.Image:
    """The image of a request as RGB.

    Raises:
        ApiError: naming ``param``, if it is not base64, not an image, or too large.
    """
    try:
        data = base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
    except ValueError as error:
        raise ApiError(
            400, f"{param}: not base64 ({error}); send the bytes of an image file in base64", param=param, code="image"
        ) from None
    if len(data) > MAX_IMAGE_BYTES:
        raise ApiError(400, f"{param}: {len(data)} bytes, {MAX_IMAGE_BYTES} allowed; send a smaller image", param=param, code="image")
    try:
        return decode(data, MAX_PIXELS)
    except ImageError as error:
        raise ApiError(400, f"{param}: {error}; send a PNG or JPEG file in base64", param=param, code="image") from None


class TaskRequest(BaseModel):
    """What all requests have. Fields named as settings of the generator's method are passed on to it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    task: ClassVar[str]
    apart: ClassVar[frozenset[str]] = frozenset({"model"})
    """Fields that are no settings of the generator's method: they are used here, or are parts of the item."""

    model: str | None = Field(None, description="the served model's id; may be left out")

    def item(self) -> tuple[Any, ...]:
        """One element for each list that the generator's method takes."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the generator's method."""
        return self.model_dump(exclude=set(self.apart), exclude_none=True)

    def call(self, generator: Generator) -> Call:
        """The call that answers this request.

        Raises:
            ApiError: for an image that cannot be read, or more than can be asked of this generator.
        """
        return Call(self.task, self.item(), tuple(sorted(self.settings().items())))


class Seeded(TaskRequest):
    """What requests have whose answers are drawn by chance."""

    seed: int = Field(0, ge=0, lt=2**53, description="the same seed gives the same answer")


class Drawing(Seeded):
    """What all requests for images have. Settings that are left out are the model's own."""

    n: int = Field(1, ge=1, le=MAX_IMAGES, description="images returned, best first")
    size: str | None = Field(
        None, max_length=20, description="WIDTHxHEIGHT: of the model's images or of its enlarged ones; 'auto': the former"
    )
    response_format: Literal["b64_json"] = "b64_json"
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    candidates: int | None = Field(
        None,
        ge=1,
        le=MAX_DRAWN,
        description=f"images drawn for each one returned; left out, the model's own number, or fewer so that {MAX_DRAWN} are drawn in all",
    )

    @field_validator("response_format", mode="before")
    @classmethod
    def no_addresses(cls, value: Any) -> Any:
        if value == "url":
            raise ValueError("this server keeps no images, so it has no addresses to give; ask for b64_json")
        return value

    def call(self, generator: Generator) -> Call:
        candidates = self.candidates or max(1, min(generator.decoding.candidates, MAX_DRAWN // self.n))
        if self.n * candidates > MAX_DRAWN:
            message = f"{self.n} images with {candidates} candidates each are more than the {MAX_DRAWN} drawn for one request"
            raise ApiError(400, f"{message}; lower n or candidates", param="candidates", code="too_many")
        settings = self.settings() | {"num_images": self.n, "candidates": candidates}
        upscaled = self.size not in (None, "auto", *sizes(generator)[:1])
        if upscaled and self.size not in sizes(generator):
            message = f"size: this model draws {' or '.join(sizes(generator))} (found {self.size!r})"
            raise ApiError(400, message, param="size", code="size")
        return Call(self.task, self.item(), tuple(sorted(settings.items())), upscaled, self.n * candidates)


def sizes(generator: Generator) -> list[str]:
    """What ``size`` may be: that of drawn images, and of enlarged ones where the model has an upscaler."""
    scales = [1] if generator.super_resolution is None else [1, generator.super_resolution.scale]
    return [f"{generator.image_size * scale}x{generator.image_size * scale}" for scale in scales]


COMMON = frozenset({"model", "n", "size", "response_format"})


class Guided(Drawing):
    """Images drawn with classifier-free guidance."""

    guidance: float | None = Field(None, ge=0, le=50, description="classifier-free guidance scale; 1: none")


class Retrieved(Guided):
    """Images drawn after retrieved documents."""

    retrieved_documents: int | None = Field(
        None,
        ge=0,
        le=16,
        validation_alias=AliasChoices("retrieved_documents", "documents"),
        description="retrieved documents before the prompt; requests of earlier versions say documents",
    )


class Writing(Seeded):
    """What all requests for text have."""

    temperature: float = Field(0.0, ge=0, le=10, description="0: the likeliest text")
