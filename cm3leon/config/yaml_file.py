"""Reading a YAML file strictly: a key named twice, bytes that are not UTF-8 and broken syntax are errors of one line each."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from cm3leon.utils.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key named twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if isinstance(key_node, yaml.ScalarNode) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is named twice, first in line {seen[key]}; keep one of the two", key_node.start_mark
                )
            if isinstance(key_node, yaml.ScalarNode):
                seen[key] = line
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, origin: str) -> Any:
    """The value of a YAML text; ``origin`` names it in errors.

    Raises:
        ConfigError: with the line, if it is not YAML or names a key twice.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(f"{origin}{_line(error)}: {error.problem}") from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{origin} is not YAML{_line(error)}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # a date that there is not
        raise ConfigError(f"{origin} is not YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path) -> Any:
    """The value of a YAML file.

    Raises:
        ConfigError: with file and line, if it is not UTF-8, is not YAML, or names a key twice.
        FileNotFoundError: if there is no such file.
    """
    return parse_yaml(read_text(path), str(path))


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        ConfigError: if it is in another encoding.
        FileNotFoundError: if there is no such file.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        raise ConfigError(f"{path} is not UTF-8: byte {wrong:#04x} at position {error.start}; save it as UTF-8") from None


def _line(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f", line {mark.line + 1}" if mark else ""
