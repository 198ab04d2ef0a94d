"""``params.yaml`` as text, and the reference table of the documentation; both are generated from the schema.

python -m cm3leon.config.writer docs/configuration.md    # write the table again between its two marks
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from cm3leon.config.schema import Config
from cm3leon.config.section import Section

WIDTH = 140
"""Longest line, characters."""

BEGIN, END = "<!-- reference: begin -->", "<!-- reference: end -->"
"""Marks in the documentation around the text of :func:`reference`."""


# --- params.yaml -----------------------------------------------------------------------------------------------------


def params_text(config: Config, header: Sequence[str] = (), reasons: Mapping[str, str] | None = None) -> str:
    """The complete parameter file of ``config``, every key with its description.

    Args:
        header: the comment at the top.
        reasons: dotted key -> why it has its value, in brackets after the key's description.
    """
    lines = [f"# {line}".rstrip() for text in header for line in text.splitlines()]
    return "\n".join([*lines, *_section(config, "", "", reasons or {})]) + "\n"


def _section(section: Section, prefix: str, indent: str, reasons: Mapping[str, str]) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        key, value = field.alias or name, getattr(section, name)
        if isinstance(value, Section):
            if not indent:
                yield ""
            yield from _comment(summary(type(value)), indent)
            yield f"{indent}{key}:"
            yield from _section(value, f"{prefix}{key}.", indent + "  ", reasons)
        else:
            reason = reasons.get(prefix + key)
            comment = f"{field.description or ''} [{reason}]".strip() if reason else field.description or ""
            yield from _entry(key, value, comment, indent)


def _entry(key: str, value: Any, comment: str, indent: str) -> Iterator[str]:
    """A key with its value and comment: on one line where they fit, else the comment above."""
    line, rest = f"{indent}{key}: {flow(value)}", []
    if isinstance(value, dict) and any(isinstance(item, dict) for item in value.values()):
        line, rest = f"{indent}{key}:", [f"{indent}  {flow(name)}: {flow(item)}" for name, item in value.items()]
    elif len(line) > WIDTH and isinstance(value, list | dict):
        line, rest = f"{indent}{key}:", list(_wrapped(value, indent + "  "))
    if comment and len(f"{line}  # {comment}") <= WIDTH:
        line = f"{line}  # {comment}"
    else:
        yield from _comment(comment, indent)
    yield line
    yield from rest


def _wrapped(value: list[Any] | dict[str, Any], indent: str) -> Iterator[str]:
    """A list or map over several lines, broken between its items."""
    text = flow(value)
    items = [flow({key: item})[1:-1] for key, item in value.items()] if isinstance(value, dict) else [flow(item) for item in value]
    line = indent + text[0]
    for number, item in enumerate(items):
        part = item + (", " if number < len(items) - 1 else text[-1])
        if len(line + part.rstrip()) > WIDTH and line.strip() != text[0]:
            yield line.rstrip()
            line = indent + "  "
        line += part
    yield line


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_on_hyphens=False)


def summary(section: type[Section]) -> str:
    """The first paragraph of a section's docstring, on one line."""
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())


def flow(value: Any) -> str:
    """A value as YAML on one line, numbers without exponents."""
    if isinstance(value, Section):
        value = value.model_dump(mode="json", by_alias=True)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float):
        text = f"{Decimal(repr(value)):f}"
        return text if "." in text else f"{text}.0"
    if isinstance(value, int):
        return str(value)
    return _string(str(value))


def _string(text: str) -> str:
    """A string, quoted where YAML would read something else in a flow collection."""
    try:
        plain = yaml.safe_load(f"[{text}, {{{text}: {text}}}]") == [text, {text: text}]
    except yaml.YAMLError:
        plain = False
    return text if plain else str(yaml.safe_dump(text, default_style='"', width=float("inf"), allow_unicode=True)).rstrip("\n")


# --- the reference ---------------------------------------------------------------------------------------------------


def reference() -> str:
    """A Markdown table for each section: key, type and bounds, default, meaning."""
    lines: list[str] = []
    for title, section, keys in _tables(Config(), "", "params.yaml"):
        lines += [f"### `{title}`", "", summary(type(section)), "", "| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{key}` | {kind} | `{default}` | {meaning} |" for key, kind, default, meaning in keys] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _tables(section: Section, prefix: str, title: str) -> Iterator[tuple[str, Section, list[tuple[str, str, str, str]]]]:
    inner, rows = [], []
    for name, field in type(section).model_fields.items():
        key, value = prefix + (field.alias or name), getattr(section, name)
        if isinstance(value, Section):
            inner.append((value, key))
        else:
            rows.append((key, type_and_bounds(field).replace("|", "\\|"), flow(value), (field.description or "").replace("|", "\\|")))
    if rows:
        yield title, section, rows
    for value, key in inner:
        yield from _tables(value, f"{key}.", key)


def type_and_bounds(field: FieldInfo) -> str:
    """The type of a field in words, with its bounds."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [f"{sign} {flow(getattr(item, name))}" for item in field.metadata for name, sign in signs.items() if hasattr(item, name)]
    return ", ".join([_type(field.annotation), *bounds])


def _type(annotation: Any) -> str:
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "any"}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in names:
        return names[annotation]
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"map of {', '.join(annotation.model_fields)}"
    if origin is Literal:
        return " or ".join(f"`{flow(value)}`" for value in arguments)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} {_type(arguments[0])}s"
    if origin is dict:
        return f"map of {_type(arguments[0])} to {_type(arguments[1])}"
    return " or ".join(_type(part) for part in arguments)


def with_reference(page: str) -> str:
    """A page of documentation with the reference between its marks written again."""
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    return f"{before}{BEGIN}\n\n{reference()}\n{END}{after}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(with_reference(file.read_text(encoding="utf-8")), encoding="utf-8")
