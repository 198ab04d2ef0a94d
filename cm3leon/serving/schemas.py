"""Parts that the requests of the HTTP interface share: limits, types of fields, and how a request becomes a call of the generator."""

from __future__ import annotations

import base64
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Len
from PIL import Image
from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from cm3leon.data.images import ImageError, decode, fit_square
from cm3leon.generation.generator import Generator
from cm3leon.generation.settings import decoding_field
from cm3leon.serving.calls import Call
from cm3leon.serving.errors import ApiError
from cm3leon.utils.texts import is_blank

MAX_BODY = 32 * 2**20
MAX_HELD = 256 * 2**20
"""Bytes of the bodies of all requests that are received or not answered yet; with the values parsed from them, twice as much memory."""
MAX_CHARACTERS = 4000
MAX_IMAGE_BYTES = 10 * 2**20
MAX_PIXELS = 25_000_000
MAX_IMAGES = 16
MAX_GENERATED = 64
"""Images generated for one request: those returned times the candidates for each."""


def not_blank(text: str) -> str:
    """The text, unless nothing of it can be seen."""
    if is_blank(text):
        raise ValueError("must not be empty")
    return text


Text = Annotated[str, StringConstraints(max_length=MAX_CHARACTERS), AfterValidator(not_blank)]
EncodedImage = Annotated[str, Field(description="an image file in base64, with or without 'data:image/png;base64,' before it")]
PixelBox = Annotated[
    list[Annotated[float, Field(ge=0, le=100_000)]],
    Len(4, 4),
    Field(description="left, top, right, bottom in pixels; right and bottom excluded"),
]


def read_image(value: str, param: str, side: int | None = None) -> Image.Image:
    """The image of a request as RGB.

    Args:
        side: of the square that the model sees, to which the image is fitted at once, as encoding it does: a request that waits holds no
            more. None keeps its size.

    Raises:
        ApiError: naming ``param``, if it is not base64, not an image, or too large.
    """
    try:
        text = value.partition(",")[2] if value.startswith("data:") else value
        data = base64.b64decode("".join(text.split()), validate=True)  # lines of 76 characters are base64 too (RFC 2045)
    except ValueError as error:
        raise ApiError(
            400, f"{param}: not base64 ({error}); send the bytes of an image file in base64", param=param, code="image"
        ) from None
    if len(data) > MAX_IMAGE_BYTES:
        raise ApiError(400, f"{param}: {len(data)} bytes, {MAX_IMAGE_BYTES} allowed; send a smaller image", param=param, code="image")
    try:
        image = decode(data, MAX_PIXELS)
        return image if side is None else fit_square(image, side)
    except ImageError as error:
        raise ApiError(400, f"{param}: {error}; send a PNG or JPEG file in base64", param=param, code="image") from None


class TaskRequest(BaseModel):
    """A request of a task. Its fields are those of the item, and settings, which the generator's method gets under the same names."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    task: ClassVar[str]
    item_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that :meth:`item` reads."""
    own_fields: ClassVar[frozenset[str]] = frozenset({"model"})
    """Other fields that are no settings of the generator's method."""

    model: str | None = Field(None, description="the served model's id; may be left out")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """Clients that are generated from OpenAI's specification send null for what was not given."""
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data

    def item(self, side: int) -> tuple[Any, ...]:
        """One element for each list that the generator's method takes; images are fitted to ``side`` pixels if that is all it sees."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the generator's method."""
        return self.model_dump(exclude=set(self.item_fields | self.own_fields), exclude_none=True)

    def call(self, generator: Generator) -> Call:
        """The call that answers this request.

        Raises:
            ApiError: for an image that cannot be read, or a request beyond the limits of this server or model.
        """
        return Call(self.task, self.item(generator.image_size), tuple(sorted(self.settings().items())))

    @property
    def is_deprecated(self) -> bool:
        """True if the request has a field of an earlier version."""
        return False


class SeededRequest(TaskRequest):
    """A request whose answer is sampled."""

    seed: int = Field(0, ge=0, lt=2**53, description="the same seed gives the same answer")


class TextRequest(SeededRequest):
    """A request for text."""

    temperature: float = decoding_field("temperature", 0.0)


class ImageRequest(SeededRequest):
    """A request for images. Settings that are left out are the model's own."""

    own_fields = frozenset({"model", "n", "size", "response_format"})
    n: int = Field(1, ge=1, le=MAX_IMAGES, description="images returned, best first")
    size: str | None = Field(
        None, max_length=20, description="WIDTHxHEIGHT: of the model's images or of its enlarged ones; 'auto': the former"
    )
    response_format: Literal["b64_json"] = "b64_json"
    temperature: float | None = decoding_field("temperature")
    top_p: float | None = decoding_field("top_p")
    top_k: int | None = decoding_field("top_k")
    candidates: int | None = decoding_field("candidates")
    likelihood: float | None = decoding_field("likelihood")

    @field_validator("response_format", mode="before")
    @classmethod
    def no_addresses(cls, value: Any) -> Any:
        if value == "url":
            raise ValueError("this server keeps no images, so it has no addresses to give; ask for b64_json")
        return value

    def call(self, generator: Generator) -> Call:
        # The model's own number of candidates, or fewer, so that n images fit in the limit.
        own = generator.decoding.tasks.get(self.task, {}).get("candidates", generator.decoding.candidates)
        candidates = self.candidates or max(1, min(own, MAX_GENERATED // self.n))
        if self.n * candidates > MAX_GENERATED:
            message = f"{self.n} images with {candidates} candidates each are more than the {MAX_GENERATED} generated for one request"
            raise ApiError(400, f"{message}; lower n or candidates", param="candidates", code="too_many")
        settings = self.settings() | {"num_images": self.n, "candidates": candidates}
        upscaled = self.size not in (None, "auto", *sizes(generator)[:1])
        if upscaled and self.size not in sizes(generator):
            message = f"size: this model generates {' or '.join(sizes(generator))} (found {self.size!r})"
            raise ApiError(400, message, param="size", code="size")
        return Call(self.task, self.item(generator.image_size), tuple(sorted(settings.items())), upscaled, self.n * candidates)


class GuidedImageRequest(ImageRequest):
    """A request for images with guidance or contrastive decoding."""

    guidance: float | None = decoding_field("guidance")
    guidance_schedule: Literal["constant", "linear", "cosine"] | None = decoding_field("guidance_schedule")
    contrastive: float | None = decoding_field("contrastive")
    contrastive_k: int | None = decoding_field("contrastive_k")
    contrastive_alpha: float | None = decoding_field("contrastive_alpha")


class RetrievingImageRequest(GuidedImageRequest):
    """A request for images with documents retrieved by its text."""

    retrieved_documents: int | None = decoding_field(
        "retrieved_documents",
        # Requests of earlier versions say documents.
        validation_alias=AliasChoices("retrieved_documents", "documents"),
    )


def sizes(generator: Generator) -> list[str]:
    """Values of ``size``: that of generated images, and that of enlarged ones if the model has an upscaler."""
    scales = [1] if generator.super_resolution is None else [1, generator.super_resolution.scale]
    return [f"{generator.image_size * scale}x{generator.image_size * scale}" for scale in scales]
