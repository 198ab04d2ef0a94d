"""A request as a call of the generator, which several requests can share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from cm3leon.generation.generator import Generator
from cm3leon.generation.results import GeneratedImage

ONE_BY_ONE = frozenset({"infill", "interleave", "upscale"})
"""Tasks whose items the generator answers one after the other: together they only wait for each other."""


@dataclass(frozen=True)
class Call:
    """A call of the generator for one item.

    Attributes:
        task: also the name of the generator's method.
        item: one element for each of the lists that the method takes.
        settings: the method's keyword arguments, sorted by name.
        upscaled: enlarge the generated images.
        rows: number of sequences that it generates.
    """

    task: str
    item: tuple[Any, ...]
    settings: tuple[tuple[str, Any], ...] = ()
    upscaled: bool = False
    rows: int = 1

    @property
    def pixels(self) -> int:
        """Pixels of its images, all together."""
        parts = [part for element in self.item for part in (element if isinstance(element, list) else [element])]
        return sum(part.width * part.height for part in parts if isinstance(part, Image.Image))

    @property
    def key(self) -> tuple[Any, ...]:
        """Calls with equal keys are answered by one call with several items; that of a task in :data:`ONE_BY_ONE` equals no other's."""
        own = id(self) if self.task in ONE_BY_ONE else None
        return self.task, len(self.item), self.settings, self.upscaled, own


def perform(generator: Generator, calls: Sequence[Call]) -> list[Any]:
    """Answer calls of equal keys by one call of the generator."""
    first = calls[0]
    columns = [list(column) for column in zip(*(call.item for call in calls), strict=True)]
    results = getattr(generator, first.task)(*columns, **dict(first.settings))
    if first.upscaled:
        upscale([image for images in results for image in images], generator)
    return list(results)


def upscale(images: Sequence[GeneratedImage], generator: Generator) -> None:
    """Enlarge generated images in place, and note it in their settings."""
    for image, enlarged in zip(images, generator.upscale([image.image for image in images]), strict=True):
        image.image = enlarged
        image.settings = {**image.settings, "upscale": True}
