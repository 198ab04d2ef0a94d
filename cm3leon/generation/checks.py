"""Checks of what a caller gives, and of what fits in the model's context. Every error says what is wrong and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cm3leon.utils.errors import UserError

if TYPE_CHECKING:
    from cm3leon.models.decoder import Decoder
    from cm3leon.sequence.grammar import Prompt


class BadInputError(UserError):
    """A request cannot be answered; the message says what to change."""


class PromptTooLongError(UserError):
    """A prompt and what is to be generated do not fit in the model's context."""


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
    """Raises :class:`BadInputError` if one of ``texts`` is empty or only white space."""
    for number, text in enumerate(texts):
        if not text.strip():
            raise BadInputError(f"{what} {number} is empty")


def check_box(what: str, box: tuple[float, float, float, float], size: tuple[int, int]) -> None:
    """Raises :class:`BadInputError` unless a box (left, top, right, bottom) has an area and lies inside an image of ``size``."""
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]):
        raise BadInputError(
            f"{what}, {tuple(box)}, must be left, top, right, bottom in pixels, inside the image of {size[0]} x {size[1]} and not empty"
        )
