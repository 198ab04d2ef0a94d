"""Parameter files: read, checked against the schema, and refused with the key, the value found and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cm3leon.config import paths
from cm3leon.config.renamed import renamed_keys
from cm3leon.config.schema import Config
from cm3leon.config.section import Section
from cm3leon.config.yaml_file import read_yaml
from cm3leon.utils.errors import ConfigError


def section_class(key: str) -> type[Section] | None:
    """The class of a dotted section; None if the schema has no section of that name. An empty key is the whole file."""
    found: type[Section] = Config
    for part in filter(None, key.split(".")):
        child = {field.alias or name: field.annotation for name, field in found.model_fields.items()}.get(part)
        if not (isinstance(child, type) and issubclass(child, Section)):
            return None
        found = child
    return found


def all_keys(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all parameters, in the order of ``params.yaml``."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from all_keys(field.annotation, f"{key}.")
        else:
            yield key


def unknown_key(key: str) -> str:
    """A sentence that refuses a dotted key and names the nearest one that exists."""
    section, _, name = key.rpartition(".")
    siblings = section_class(section)
    names = [f"{section}.{known}".lstrip(".") for known in _names(siblings)] if siblings else []
    known = list(all_keys())
    nearest = difflib.get_close_matches(key, names, 1, 0.7) or difflib.get_close_matches(key, [*known, *_names(Config)], 1, 0.6)
    nearest = nearest or [other for other in known if other.rpartition(".")[2] == name]
    return f"{key}: unknown key" + (f"; did you mean {nearest[0]}?" if nearest else "; docs/configuration.md lists all keys")


def _names(section: type[Section]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def parse_config(data: Any, origin: str) -> Config:
    """Validate a parameter tree; ``origin`` names it in errors. Keys that are missing take their defaults.

    Raises:
        ConfigError: naming each wrong key, the value found and what is allowed; one line for one wrong key.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{origin}: expected a mapping of sections, found {type(data).__name__}")
    if "extends" in data:
        raise ConfigError(f"{origin}: only profiles in configs/ extend others; write a complete file with: cm3leon configure NAME")
    if renamed := list(renamed_keys(data)):
        raise ConfigError(f"{origin} has keys of an earlier version: " + "; ".join(renamed))
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                lines.append(unknown_key(key))
            elif item["type"] == "value_error":  # of a check over several keys, which says what it found
                lines.append(f"{key or '(file)'}: {item['msg'].removeprefix('Value error, ')}")
            else:
                lines.append(f"{key or '(file)'}: {item['msg']} (found {item['input']!r})")
        listing = lines[0] if len(lines) == 1 else f"{len(lines)} keys are wrong:" + "".join(f"\n  {line}" for line in lines)
        raise ConfigError(f"{origin}: {listing}") from None


def load_config(path: str | Path = paths.PARAMS) -> Config:
    """Read and validate a parameter file.

    Raises:
        ConfigError: if the file is missing, is not YAML or not UTF-8, names a key twice, or holds an unknown key or impossible value.
    """
    path = Path(path)
    try:
        data = read_yaml(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; write it with: cm3leon configure small") from None
    return parse_config(data, str(path))
