"""Checks of a caller's input, decoding settings, and lengths in the model's context. Errors say what is wrong and what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cm3leon.config.renamed import current_name
from cm3leon.utils.errors import UserError
from cm3leon.utils.texts import as_unicode, is_blank, is_unicode

if TYPE_CHECKING:
    from cm3leon.config.schema import DecodingConfig
    from cm3leon.generation.parts import Parts
    from cm3leon.models.decoder import Decoder
    from cm3leon.sequence.grammar import Prompt


HOW_TO_TUNE = "add it to sft.tasks, and to the collection what it is made of (docs/data.md), and train again"
"""What to do about a task that a model was not tuned for."""


class BadInputError(UserError):
    """A request cannot be answered; the message says what to change."""


class PromptTooLongError(UserError):
    """A prompt and the tokens to generate do not fit in the model's context."""


def free_tokens(model: Decoder, prompts: Sequence[Prompt]) -> int:
    """Tokens of the context that remain after the longest of some prompts; negative if it is longer than the context."""
    return model.spec.context - max(len(prompt) for prompt in prompts)


def check_room(model: Decoder, prompts: Sequence[Prompt], needed: int, what: str = "a prompt") -> None:
    """Check that prompts leave room in the context for ``needed`` tokens each.

    Args:
        what: names the prompts in the error.

    Raises:
        PromptTooLongError: if the longest of them does not.
    """
    free = free_tokens(model, prompts)
    if free < needed:
        size = f"{what} of {model.spec.context - free} tokens"
        problem = f"{size} and {needed} to generate do not fit" if needed else f"{size} does not fit"
        advice = "shorten the text or use fewer retrieved documents"
        raise PromptTooLongError(f"{problem} in the context of {model.spec.context}; {advice}")


def check_same_length(one: str, values: Sequence[Any], other: str, others: Sequence[Any]) -> None:
    """Raises :class:`BadInputError` unless there is one of ``others`` for each of ``values``."""
    if len(values) != len(others):
        raise BadInputError(f"{len(values)} {one}s but {len(others)} {other}s; give one {other} for each {one}")


def check_not_blank(what: str, texts: Sequence[str]) -> None:
    """Raises :class:`BadInputError` if nothing of one of ``texts`` can be seen, or some of it is no Unicode."""
    for number, text in enumerate(texts):
        if not is_unicode(text):
            raise BadInputError(f"{what} {number}, '{as_unicode(text)}', is not UTF-8 throughout; write it in UTF-8")
        if is_blank(text):
            raise BadInputError(f"{what} {number} is empty")


def check_box(what: str, box: tuple[float, float, float, float], size: tuple[int, int]) -> None:
    """Raises :class:`BadInputError` unless a box (left, top, right, bottom) has an area and lies inside an image of ``size``."""
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]):
        raise BadInputError(
            f"{what}, {tuple(box)}, must be left, top, right, bottom in pixels, inside the image of {size[0]} x {size[1]} and not empty"
        )


def checked_settings(defaults: DecodingConfig, changes: Mapping[str, Any]) -> DecodingConfig:
    """Decoding defaults with changes; a change of None is none.

    Raises:
        BadInputError: naming the setting and what is allowed.
    """
    from pydantic import ValidationError  # this module is also for machines without pydantic, which decode but check no settings

    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return type(defaults).model_validate({**defaults.model_dump(), **given})
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # of a check over several settings, which says what it found
            raise BadInputError(first["msg"].removeprefix("Value error, ")) from None
        name = first["loc"][0]
        if new := current_name(f"decoding.{name}"):
            raise BadInputError(f"{name} is now called {new.removeprefix('decoding.')}") from None
        raise BadInputError(f"{name}: {first['msg']} (found {first['input']!r})") from None


def task_settings(parts: Parts, task: str, changes: Mapping[str, Any]) -> DecodingConfig:
    """As :func:`checked_settings`, with the task's own defaults, for an instruction-tuning task.

    Raises:
        BadInputError: also if the model was not trained for the task or for guidance.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    settings = checked_settings(parts.decoding, {**parts.decoding.tasks.get(task, {}), **given})
    if task not in parts.trained_tasks:
        known = ", ".join(sorted(parts.trained_tasks))
        raise BadInputError(f"this model was not tuned for {task} (it knows {known}); {HOW_TO_TUNE}")
    guided = settings.guidance != 1 or settings.contrastive > 0 or (task == "edit" and settings.image_guidance != 1)
    if guided and parts.training is not None and not parts.training.masked_prompts:
        raise BadInputError(
            "guidance and contrastive decoding need a model that was trained on masked prompts (sft.conditioning_dropout or "
            "pretrain.objective.segment_rate above 0), and this one was not; use guidance 1 and contrastive 0"
        )
    return settings
