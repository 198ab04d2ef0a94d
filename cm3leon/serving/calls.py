"""A request as a call of the generator, alone or together with its like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cm3leon.generation.generator import Generator


@dataclass(frozen=True)
class Call:
    """A call of the generator for one item.

    Attributes:
        task: the generator's method.
        item: one element for each of the lists that the method takes.
        settings: its keyword arguments, in order of their names.
        upscaled: enlarge the images drawn.
        rows: how many sequences it generates.
    """

    task: str
    item: tuple[Any, ...]
    settings: tuple[tuple[str, Any], ...] = ()
    upscaled: bool = False
    rows: int = 1

    @property
    def key(self) -> tuple[Any, ...]:
        """Calls with equal keys can be one call with several items."""
        return self.task, len(self.item), self.settings, self.upscaled


def perform(generator: Generator, calls: Sequence[Call]) -> list[Any]:
    """Answer calls of equal keys by one call of the generator."""
    first = calls[0]
    columns = [list(column) for column in zip(*(call.item for call in calls), strict=True)]
    results = getattr(generator, first.task)(*columns, **dict(first.settings))
    if first.upscaled:
        drawn = [image for images in results for image in images]
        for image, large in zip(drawn, generator.upscale([image.image for image in drawn]), strict=True):
            image.image, image.settings = large, {**image.settings, "upscale": True}
    return list(results)
