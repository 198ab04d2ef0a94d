"""What must not be trained on, such as the images and captions of benchmarks: ``data/excluded``, which its README describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from cm3leon.config.schema import ValidateConfig
from cm3leon.data.bounded import bounded_map
from cm3leon.data.directories import files_below
from cm3leon.data.images import SUFFIXES, ImageError, decode
from cm3leon.data.near_duplicates import Likeness, near_duplicate_groups
from cm3leon.data.thumbnails import stack, thumbnail_of
from cm3leon.utils.errors import UserError
from cm3leon.utils.texts import folded


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
    def read(cls, directory: Path, config: ValidateConfig) -> Excluded:
        """All images and text files under a directory; nothing if there is none. Images have the limits that those of records have.

        Raises:
            UserError: naming a file or a directory that cannot be read, or a link that leads out of the directory, so that what it holds
                would not be kept out.
        """
        found = cls()
        images: list[Path] = []
        for file in files_below(directory):
            if file.suffix.lower() in SUFFIXES:
                images.append(file)
            elif file.suffix.lower() == ".txt":
                for number, line in enumerate(_lines(file), 1):
                    found.captions.setdefault(folded(line), f"{file.relative_to(directory).as_posix()} line {number}")
            elif file.name != "README.md":
                raise UserError(f"{file} is neither an image ({', '.join(SUFFIXES)}) nor a .txt of captions; convert or remove it")
        found.captions.pop("", None)
        read = partial(_thumbnail, max_pixels=config.max_pixels)
        for file, done in zip(images, bounded_map(read, images, config.workers, config.max_seconds, config.max_megabytes), strict=True):
            if done.result is None:
                raise _unreadable(file, done.excess)
            found.images[file.relative_to(directory).as_posix()] = done.result
        return found

    def caption_of(self, captions: Sequence[str]) -> str | None:
        """Where one of the captions stands; None if none is excluded."""
        if not self.captions:
            return None
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
            same = {thumbnail: name for name, thumbnail in self.images.items()}  # also where near-duplicates are not looked for
            for row, group in zip(rows, np.asarray(groups[len(self.images) :]).tolist(), strict=True):
                like[row] = same.get(thumbnails[row]) or names.get(group)
        return like


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from None


def _thumbnail(file: Path, max_pixels: int) -> bytes:
    try:
        return thumbnail_of(decode(file.read_bytes(), max_pixels))
    except (ImageError, OSError) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, why: object) -> UserError:
    return UserError(f"{file} cannot be read ({why}); replace or remove it")
