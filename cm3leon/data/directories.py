"""The files below a directory of the user's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

from cm3leon.utils.errors import UserError


def files_below(directory: Path) -> list[Path]:
    """All files below a directory, in the order of their paths; none if it does not exist.

    Links to files are among them, also broken ones. A link to a directory inside of it leads to files that are found anyway.

    Raises:
        UserError: if a directory in it cannot be read, or is a link that leads out of it. What lies there would be left out, and DVC, which
            runs a stage again when its input has changed, follows no such link either.
    """
    if not directory.exists():
        return []
    root = directory.resolve()
    found: list[Path] = []
    for place, directories, files in os.walk(directory, onerror=_raise):
        for link in (Path(place, name) for name in directories):
            if link.is_symlink() and not link.resolve().is_relative_to(root):
                raise UserError(
                    f"{link} is a link to the directory {link.resolve()}, and such links are not followed: move or copy the files to {link}"
                )
        found += [Path(place, name) for name in files]
    return sorted(found)


def _raise(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}); make it readable, or move it away")
