"""What must not be trained on, such as the images and captions of benchmarks: ``data/excluded``, which its README describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cm3leon.data.images import SUFFIXES, ImageError, decode
from cm3leon.data.near_duplicates import Likeness, near_duplicate_groups
from cm3leon.data.thumbnails import stack, thumbnail_of
from cm3leon.utils.errors import UserError
from cm3leon.utils.texts import folded


class ExcludedError(UserError):
    """A file in the directory cannot be read, so that what it names would not be kept out."""


@dataclass(frozen=True)
class Excluded:
    """Images and captions to keep out.

    Attributes:
        images: thumbnail of each image, by its file.
        captions: where each caption stands, by the caption as :func:`~cm3leon.utils.texts.folded`.
    """

    images: dict[str, bytes] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path, max_pixels: int) -> Excluded:
        """All images and text files under a directory; nothing if there is none.

        Raises:
            ExcludedError: naming a file that cannot be read.
        """
        found = cls()
        for file in sorted(file for file in directory.rglob("*") if file.is_file()):
            name = file.relative_to(directory).as_posix()
            try:
                if file.suffix.lower() in SUFFIXES:
                    found.images[name] = thumbnail_of(decode(file.read_bytes(), max_pixels))
                elif file.suffix.lower() == ".txt":
                    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
                        found.captions.setdefault(folded(line), f"{name} line {number}")
                elif file.name != "README.md":
                    raise ExcludedError(f"{file} is neither an image ({', '.join(SUFFIXES)}) nor a .txt of captions; convert or remove it")
            except (ImageError, OSError, UnicodeDecodeError) as error:
                raise ExcludedError(f"{file} cannot be read ({error}); replace or remove it") from None
        found.captions.pop("", None)
        return found

    def caption_of(self, captions: Sequence[str]) -> str | None:
        """Where one of the captions stands; None if none is excluded."""
        return next((self.captions[key] for text in captions if (key := folded(text or "")) in self.captions), None)

    def images_like(self, thumbnails: Sequence[bytes], likeness: Likeness) -> list[str | None]:
        """For each thumbnail the file of an excluded image that is the same or a near-duplicate, directly or through others; else None.

        Args:
            thumbnails: empty for records without an image, which are like none.
        """
        like: list[str | None] = [None] * len(thumbnails)
        if self.images:
            rows = [row for row, thumbnail in enumerate(thumbnails) if thumbnail]
            groups = near_duplicate_groups(stack([*self.images.values(), *(thumbnails[row] for row in rows)]), likeness)
            names = dict(zip(groups[: len(self.images)].tolist(), self.images, strict=False))
            for row, group in zip(rows, np.asarray(groups[len(self.images) :]).tolist(), strict=True):
                like[row] = names.get(group)
        return like
