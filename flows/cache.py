"""Objects of DVC's cache that were damaged: DVC takes a read-only one for intact without reading it, and would restore it as it is."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml


def remove_damaged(stage: str) -> list[str]:
    """Remove objects of a stage's outputs whose content is not the one in their name, and the outputs that were restored from them.

    Returns:
        Paths of those outputs, which the stage has to make anew; empty if all are intact.
    """
    from dvc.repo import Repo

    outputs = yaml.safe_load(Path("dvc.lock").read_text())["stages"][stage]["outs"]
    with Repo() as repo:
        damaged = {out["path"]: list(_damaged(out["md5"], repo.cache.local.oid_to_path)) for out in outputs}
    for path, objects in damaged.items():
        for found in objects:
            found.unlink(missing_ok=True)  # outputs may share it
        if objects:
            shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink(missing_ok=True)
    return [path for path, objects in damaged.items() if objects]


def _damaged(md5: str, path_of: Callable[[str], str]) -> Iterator[Path]:
    path = Path(path_of(md5))
    if not path.is_file():
        return
    with path.open("rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() != md5.removesuffix(".dir"):
            yield path
            return
    if md5.endswith(".dir"):  # lists the objects of a directory's files
        for entry in json.loads(path.read_bytes()):
            yield from _damaged(entry["md5"], path_of)
