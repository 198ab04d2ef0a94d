"""Images that are not all in memory: they are decoded where they are read, a few at a time, and again where they are read again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from PIL import Image

CHUNK = 128
"""Images in memory at once; a multiple of the batches in which networks read and decode them."""


class Pictures(Sequence[Image.Image]):
    """A sequence of ``total`` images.

    Args:
        make: makes the images of a slice.
    """

    def __init__(self, total: int, make: Callable[[slice], list[Image.Image]]) -> None:
        self.total, self.make = total, make
        self.first, self.images = 0, list[Image.Image]()

    def __len__(self) -> int:
        return self.total

    @overload
    def __getitem__(self, position: int) -> Image.Image: ...
    @overload
    def __getitem__(self, position: slice) -> list[Image.Image]: ...
    def __getitem__(self, position: int | slice) -> Image.Image | list[Image.Image]:
        """An image, or a list of those of a slice."""
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(self.total))]
        row = range(self.total)[position]
        if not self.first <= row < self.first + len(self.images):
            self.first, self.images = row - row % CHUNK, []
            self.images = self.make(slice(self.first, min(self.first + CHUNK, self.total)))
        return self.images[row - self.first]
