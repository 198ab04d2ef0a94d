"""The registered model's MLflow signature, and the parameters of a request.

MLflow drops parameters that the signature does not name, with a warning in the server's log, before the model sees them; those that it lets
through are checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from cm3leon.config.renamed import current_names
from cm3leon.config.schema import DecodingConfig
from cm3leon.config.section import Section
from cm3leon.generation.settings import decoding_field

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

REQUEST_COLUMNS = ("task", "prompt", "image", "question", "instruction", "text", "kind", "context", "box", "objects", "document", "options")
"""Columns of a request, all text; those in :data:`JSON_COLUMNS` hold JSON."""
JSON_COLUMNS = ("box", "objects", "document", "options")

OUTPUTS = {
    "row": "long", "task": "string", "text": "string", "image_png": "string", "score": "double", "seed": "long",
    "retrieved_documents": "string", "text_log_likelihood": "double", "image_log_likelihood": "double",
}  # fmt: skip
"""Columns of an answer and MLflow's types of them; the first two are always there."""


class RequestSettings(Section):
    """Parameters of a request. None takes the bundle's decoding default; a task ignores those that it has no use for."""

    num_images: int = Field(1, ge=1, le=16, description="images returned for each prompt")
    seed: int = Field(0, ge=0)
    temperature: float | None = decoding_field("temperature")
    top_p: float | None = decoding_field("top_p")
    top_k: int | None = decoding_field("top_k")
    candidates: int | None = decoding_field("candidates")
    likelihood: float | None = decoding_field("likelihood")
    guidance: float | None = decoding_field("guidance")
    guidance_schedule: Literal["constant", "linear", "cosine"] | None = decoding_field("guidance_schedule")
    contrastive: float | None = decoding_field("contrastive")
    contrastive_k: int | None = decoding_field("contrastive_k")
    contrastive_alpha: float | None = decoding_field("contrastive_alpha")
    image_guidance: float | None = decoding_field("image_guidance")
    retrieved_documents: int | None = decoding_field("retrieved_documents")
    text_temperature: float = decoding_field("temperature", 0.0)
    segments: int = Field(2, ge=1, le=8, description="texts and images that interleave adds, at most")


def request_settings(params: Mapping[str, Any] | None) -> RequestSettings:
    """Check the parameters of a request.

    Raises:
        ValueError: with a line for each unknown or impossible parameter.
    """
    given = current_names(params or {}, "decoding")  # earlier signatures fill in earlier names
    if given.pop("long", False):
        raise ValueError("long: a long caption is now the task long_caption; name it in the column task")
    try:
        return RequestSettings.model_validate(given)
    except ValidationError as error:
        known = ", ".join(RequestSettings.model_fields)
        lines = [
            f"unknown parameter {item['loc'][0]!r}; known are {known}"
            if item["type"] == "extra_forbidden"
            else f"{item['loc'][0]}: {item['msg']} (found {item['input']!r})"
            for item in error.errors()
        ]
        raise ValueError("; ".join(lines)) from None


def signature(decoding: DecodingConfig) -> ModelSignature:
    """The signature registered with a bundle; its parameters' defaults are the bundle's decoding defaults."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    defaults = RequestSettings().model_dump() | decoding.model_dump(include=set(RequestSettings.model_fields))
    types = {int: DataType.long, float: DataType.double, str: DataType.string, type(None): DataType.long}
    columns: list[ColSpec | TensorSpec] = [ColSpec(DataType.string, name, required=False) for name in REQUEST_COLUMNS]
    outputs: list[ColSpec | TensorSpec] = [
        ColSpec(DataType[kind], name, required=name in ("row", "task")) for name, kind in OUTPUTS.items()
    ]
    params = [ParamSpec(name, types[type(value)], value) for name, value in defaults.items()]
    return ModelSignature(inputs=Schema(columns), outputs=Schema(outputs), params=ParamSchema(params))
