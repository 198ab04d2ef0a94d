"""Keys that earlier versions called otherwise: files that they wrote still load, parameter files of users are refused with the new name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

RENAMED = {
    "ingest.folder.licence": "ingest.folder.license",
    "validate.licences": "validate.licenses",
    "pretrain.documents": "pretrain.retrieved_documents",
    "pretrain.neighbours": "pretrain.neighbors",
    "pretrain.validation_documents": "pretrain.validation_samples",
    "pretrain.model.rotation": "pretrain.model.rope",
    "sft.caption_drop": "sft.conditioning_dropout",
    "sft.documents": "sft.retrieved_documents",
    "sft.neighbours": "sft.neighbors",
    "sft.validation_documents": "sft.validation_samples",
    "decoding.documents": "decoding.retrieved_documents",
    "decoding.tasks.*.documents": "decoding.tasks.*.retrieved_documents",
}
"""Keys of earlier versions and their names today; ``*`` is any key. A parameter file with an old key is refused with the new name; JSON
files that an earlier version wrote are read through :func:`current_names`."""


def current_name(key: str) -> str | None:
    """Today's name of a dotted key that was renamed; None for any other key."""
    for old, new in RENAMED.items():
        parts = key.split(".")
        if len(parts) == old.count(".") + 1 and all(pattern in ("*", part) for part, pattern in zip(parts, old.split("."), strict=True)):
            return ".".join(part if pattern == "*" else pattern for part, pattern in zip(parts, new.split("."), strict=True))
    return None


def current_names(stored: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The tree of a stored file with the names of today.

    Args:
        stored: parameters as an earlier version wrote them, into a model's directory, say.
        section: dotted name of the section that they belong to; empty for a tree of sections.

    Raises:
        TypeError: if the file does not hold a mapping.
    """
    if not isinstance(stored, Mapping):
        raise TypeError(f"expected a mapping of parameters, found {type(stored).__name__}")
    found: dict[str, Any] = {}
    for key, value in stored.items():
        path = f"{section}.{key}" if section else key
        name = (current_name(path) or path).rpartition(".")[2]
        found[name] = current_names(value, path) if isinstance(value, Mapping) else value
    return found


def renamed_keys(tree: Mapping[Any, Any], section: str = "") -> Iterator[str]:
    """One sentence for each old key of a parameter tree."""
    for key, value in tree.items():
        path = f"{section}.{key}" if section else str(key)
        if new := current_name(path):
            yield f"{path} is now called {new}"
        elif isinstance(value, Mapping):
            yield from renamed_keys(value, path)
