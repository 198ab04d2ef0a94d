"""What the served model takes and gives: its MLflow signature and the parameters of a request.

MLflow drops parameters that the signature does not name, with a warning in the server's log, before the model sees them; what it lets
through is checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from cm3leon.config.schema import DecodingConfig, Section, current_names

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

REQUEST_COLUMNS = ("task", "prompt", "image", "question", "instruction", "text", "kind", "context", "box", "objects", "document", "options")
"""Of a request, all text; ``box``, ``objects``, ``document`` and ``options`` are JSON."""
JSON_COLUMNS = ("box", "objects", "document", "options")

OUTPUTS = {
    "row": "long", "task": "string", "text": "string", "image_png": "string", "score": "double", "seed": "long", "neighbors": "string",
    "text_log_likelihood": "double", "image_log_likelihood": "double",
}  # fmt: skip
"""Columns of an answer and MLflow's types of them; the first two are always there."""


class RequestSettings(Section):
    """Parameters of a request. None takes the bundle's decoding default; a task ignores those that it has no use for."""

    num_images: int = Field(1, ge=1, le=16, description="images returned for each prompt")
    seed: int = Field(0, ge=0)
    temperature: float | None = Field(None, ge=0, le=10, description="of drawing; 0: greedy")
    top_p: float | None = Field(None, gt=0, le=1)
    guidance: float | None = Field(None, ge=0, le=50, description="classifier-free guidance scale; 1: none")
    image_guidance: float | None = Field(None, ge=0, le=50, description="in editing, towards the image that is edited")
    candidates: int | None = Field(None, ge=1, le=64, description="images drawn for each one returned")
    retrieved_documents: int | None = Field(None, ge=0, le=16, description="retrieved documents before the prompt")
    text_temperature: float = Field(0.0, ge=0, le=10, description="of writing; 0: the likeliest text")
    long: bool = Field(False, description="captions at length")
    segments: int = Field(2, ge=1, le=8, description="texts and images that interleave adds, at most")


def request_settings(params: Mapping[str, Any] | None) -> RequestSettings:
    """Check the parameters of a request.

    Raises:
        ValueError: with a line for each unknown or impossible parameter.
    """
    try:
        return RequestSettings.model_validate(current_names(params or {}, "decoding"))  # earlier signatures fill in earlier names
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
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    defaults = RequestSettings().model_dump() | decoding.model_dump(include=set(RequestSettings.model_fields))
    types = {bool: DataType.boolean, int: DataType.long, float: DataType.double}
    columns = [ColSpec(DataType.string, name, required=False) for name in REQUEST_COLUMNS]
    outputs = [ColSpec(DataType[kind], name, required=name in ("row", "task")) for name, kind in OUTPUTS.items()]
    params = [ParamSpec(name, types[type(value)], value) for name, value in defaults.items()]
    return ModelSignature(inputs=Schema(columns), outputs=Schema(outputs), params=ParamSchema(params))
