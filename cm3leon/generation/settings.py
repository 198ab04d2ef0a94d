"""Decoding settings of a call: the bundle's defaults with what the caller changes, checked.

:class:`~cm3leon.config.schema.DecodingConfig` declares every setting once, with its bounds and its description. Commands, HTTP requests and
the signature of the registered model derive theirs from it (:func:`decoding_field`), so that all say and allow the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from cm3leon.config.schema import DecodingConfig, current_name
from cm3leon.generation.checks import BadInputError

if TYPE_CHECKING:
    from cm3leon.generation.parts import Parts

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
"""Settings of what is generated from one stream."""


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


def checked_settings(defaults: DecodingConfig, changes: Mapping[str, Any]) -> DecodingConfig:
    """Decoding defaults with changes; a change of None is none.

    Raises:
        BadInputError: naming the setting and what is allowed.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return DecodingConfig.model_validate({**defaults.model_dump(), **given})
    except ValidationError as error:
        first = error.errors()[0]
        name = first["loc"][0]
        if new := current_name(f"decoding.{name}"):
            raise BadInputError(f"{name} is now called {new.removeprefix('decoding.')}") from None
        raise BadInputError(f"{name}: {first['msg']} (found {first['input']!r})") from None


def task_settings(parts: Parts, task: str, changes: Mapping[str, Any]) -> DecodingConfig:
    """As :func:`checked_settings`, with the task's own defaults, for an instruction-tuning task.

    Raises:
        BadInputError: too if the model was not trained for the task, or not for the guidance that is asked for.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    settings = checked_settings(parts.decoding, {**parts.decoding.tasks.get(task, {}), **given})
    if task not in parts.trained_tasks:
        known = ", ".join(sorted(parts.trained_tasks))
        raise BadInputError(f"this model was not tuned for {task} (it knows {known}); add it to sft.tasks and train again")
    guided = settings.guidance != 1 or settings.contrastive > 0 or (task == "edit" and settings.image_guidance != 1)
    if guided and parts.training is not None and not parts.training.masked_prompts:
        raise BadInputError(
            "guidance and contrastive decoding need a model that was trained on masked prompts (sft.conditioning_dropout or "
            "pretrain.objective.segment_rate above 0), and this one was not; use guidance 1 and contrastive 0"
        )
    return settings
