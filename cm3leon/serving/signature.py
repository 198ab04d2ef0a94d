"""What the served model takes and gives: its MLflow signature and the settings of a request.

MLflow drops parameters that the signature does not name, with a warning in the server's log, before the model sees them; what it lets
through is checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from cm3leon.config import DecodingConfig, Section

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

COLUMNS = ("task", "prompt", "image", "question")
TASKS = ("text_to_image", "caption", "vqa")


class RequestSettings(Section):
    """Parameters of a request. None takes the bundle's decoding default."""

    num_images: int = Field(1, ge=1, le=64, description="images returned for each prompt")
    seed: int = Field(0, ge=0)
    temperature: float | None = Field(None, ge=0, description="0: greedy")
    top_p: float | None = Field(None, gt=0, le=1)
    guidance: float | None = Field(None, ge=0, description="classifier-free guidance scale; 1: none")
    candidates: int | None = Field(None, ge=1, le=64, description="images drawn for each one returned")
    likelihood: float | None = Field(None, ge=0, description="weight of the prompt's log-likelihood beside the CLIP score in ranking")
    documents: int | None = Field(None, ge=0, description="retrieved documents before the prompt")


def request_settings(params: Mapping[str, Any] | None) -> RequestSettings:
    """Check the parameters of a request.

    Raises:
        ValueError: with a line for each unknown or impossible parameter.
    """
    try:
        return RequestSettings.model_validate(dict(params or {}))
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
    columns = [ColSpec(DataType.string, name, required=False) for name in COLUMNS]
    params = [ParamSpec(name, DataType.double if isinstance(value, float) else DataType.long, value) for name, value in defaults.items()]
    outputs = [
        ColSpec(DataType.long, "row"),
        ColSpec(DataType.string, "task"),
        ColSpec(DataType.string, "text", required=False),
        ColSpec(DataType.string, "image_png", required=False),
        ColSpec(DataType.double, "score", required=False),
        ColSpec(DataType.long, "seed", required=False),
        ColSpec(DataType.string, "neighbours", required=False),
    ]
    return ModelSignature(inputs=Schema(columns), outputs=Schema(outputs), params=ParamSchema(params))
