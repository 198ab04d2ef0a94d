"""The decoding settings of each task, as commands, HTTP requests and the signature of the registered model offer them.

:class:`~cm3leon.config.schema.DecodingConfig` declares every setting once, with its bounds and its description. The others derive theirs
from it (:func:`decoding_field`), so that names, bounds and help are equal.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pydantic import Field

from cm3leon.config.schema import DecodingConfig

SAMPLING = ("temperature", "top_p", "top_k")
IMAGE = (*SAMPLING, "candidates", "likelihood")
GUIDED_IMAGE = (*IMAGE, "guidance", "guidance_schedule", "contrastive", "contrastive_k", "contrastive_alpha")

SETTINGS: dict[str, tuple[str, ...]] = {
    "text_to_image": (*GUIDED_IMAGE, "retrieved_documents"),
    "write": (*GUIDED_IMAGE, "retrieved_documents"),
    "layout_to_image": (*GUIDED_IMAGE, "retrieved_documents"),
    "condition_to_image": GUIDED_IMAGE,
    "edit": (*GUIDED_IMAGE, "image_guidance"),
    "infill": IMAGE,
    "interleave": SAMPLING,
}
"""Task -> the decoding settings that a request of it may have. Tasks that generate text take a temperature, 0 by default, and the bundle's
own ``top_p`` and ``max_text_tokens``."""

UNGUIDED = {"guidance": 1.0, "contrastive": 0.0}
"""Settings of generation from one stream."""


def decoding_type(name: str) -> Any:
    """A decoding setting's type."""
    return DecodingConfig.model_fields[name].annotation


def bounds_of(name: str) -> dict[str, Any]:
    """A decoding setting's bounds, as arguments of pydantic's ``Field``: ``{"ge": 0, "le": 10}``."""
    return {key: value for bound in DecodingConfig.model_fields[name].metadata for key, value in asdict(bound).items()}


def description_of(name: str) -> str:
    """A decoding setting's description."""
    return DecodingConfig.model_fields[name].description or ""


def decoding_field(name: str, default: Any = None, **options: Any) -> Any:
    """A field of a request with the bounds and the description of a decoding setting; None takes the model's own value."""
    return Field(default, description=description_of(name), **bounds_of(name), **options)
