"""Profiles in ``configs/``, each a file of what differs from its parent, and the complete ``params.yaml`` that is written from one.

A profile names its parent with ``extends: NAME``; one without a parent differs from the defaults of the schema, which are profile
``small``. Sections are merged; a list or a map of the user's own keys (``sft.tasks``, ``gate.floors``) is replaced as a whole.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cm3leon.config import paths
from cm3leon.config.loading import load_config, parse_config, section_class, unknown_key
from cm3leon.config.rehearsal import rehearsed
from cm3leon.config.renamed import current_name
from cm3leon.config.schema import Config
from cm3leon.config.writer import params_text
from cm3leon.config.yaml_file import parse_yaml, read_text
from cm3leon.utils.errors import ConfigError

CONFIGS = Path("configs")


@dataclass(frozen=True)
class Profile:
    """A resolved profile. ``header``: the comment at the top of its file; ``reasons``: dotted key -> comment of the line that sets it."""

    config: Config
    header: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


def profile_names(configs: Path = CONFIGS) -> list[str]:
    """Names of the profiles there are."""
    return sorted(path.stem for path in configs.glob("*.yaml"))


def read_profile(profile: str, configs: Path = CONFIGS) -> Profile:
    """A profile with all that it inherits.

    Raises:
        ConfigError: for an unknown profile or parent, a cycle of parents, or a profile that is not valid.
    """
    files = _lineage(profile, configs)
    tree: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    config = Config()
    for path, text, own in reversed(files):
        if own.get("profile") != path.stem:
            raise ConfigError(f"{path}: profile is {own.get('profile')!r}; it must be the name of the file, {path.stem!r}")
        tree = _merged(tree, {key: value for key, value in own.items() if key != "extends"})
        config = parse_config(tree, str(path))
        reasons |= dict(_line_comments(yaml.compose(text, yaml.SafeLoader), text.splitlines()))
    return Profile(config, _header(files[0][1]), {key: comment for key, comment in reasons.items() if comment})


def _lineage(profile: str, configs: Path) -> list[tuple[Path, str, dict[str, Any]]]:
    """File, text and tree of a profile, of its parent, and so on."""
    found: list[tuple[Path, str, dict[str, Any]]] = []
    name: Any = profile
    while name is not None:
        path = configs / f"{name}.yaml"
        if any(path == earlier for earlier, _, _ in found):
            chain = " -> ".join([*(earlier.stem for earlier, _, _ in found), path.stem])
            raise ConfigError(f"{found[-1][0]}: extends {name}, which closes a cycle: {chain}")
        if not path.is_file():
            where = f"{found[-1][0]}: extends {name!r}, but there" if found else "there"
            raise ConfigError(f"{where} is no profile {name!r}; {configs}/ has: {', '.join(profile_names(configs)) or 'none'}")
        text = read_text(path)
        tree = parse_yaml(text, str(path))
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
        found.append((path, text, tree))
        name = tree.get("extends")
    return found


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """``base`` with ``changes``: sections key by key, everything else replaced."""
    found = dict(base)
    for key, value in changes.items():
        path = f"{section}.{key}".lstrip(".")
        if isinstance(value, Mapping) and isinstance(found.get(key), Mapping) and section_class(path):
            value = _merged(found[key], value, path)
        found[key] = value
    return found


def _header(text: str) -> list[str]:
    """The comment at the top of a file."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return lines


def _line_comments(node: yaml.Node | None, lines: list[str], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys of a file and the comment at the end of each one's value; empty where there is none."""
    assert isinstance(node, yaml.MappingNode)
    for key, value in node.value:
        path = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode) and section_class(path):
            yield from _line_comments(value, lines, f"{path}.")
        else:
            end = value.end_mark if isinstance(value, yaml.ScalarNode) or value.flow_style else key.end_mark
            _, _, comment = lines[end.line][end.column :].partition("#") if end.line < len(lines) else ("", "", "")
            yield path, comment.strip()


# --- params.yaml -----------------------------------------------------------------------------------------------------


def configure(
    profile: str, changes: Iterable[str] = (), configs: Path = CONFIGS, params: Path = paths.PARAMS, *, rehearse: bool = False
) -> Config:
    """Write the complete ``params.yaml`` of a profile with ``key.path=value`` changes; nothing is written unless all is valid.

    Values are YAML: ``pretrain.steps=2000``, ``sft.tasks={caption: 1.0}``, ``ingest.source=folder``.

    Args:
        rehearse: write the profile's :func:`~cm3leon.config.rehearsal.rehearsed` parameters, with the changes.

    Raises:
        ConfigError: for an unknown profile or key, a change that is no assignment, or an impossible value.
    """
    changes = list(changes)
    found = read_profile(profile, configs)
    start = rehearsed(found.config, read_profile("tiny", configs).config) if rehearse else found.config
    config = _with_changes(start, changes, f"{configs / profile}.yaml")
    changed = [change.partition("=")[0].strip() for change in changes]
    kept = {} if rehearse else found.reasons
    reasons = {key: why for key, why in kept.items() if not any(f"{key}.".startswith(f"{name}.") for name in changed)}
    command = " ".join(
        [f"cm3leon configure {profile}", *(["--rehearse"] if rehearse else []), *(f"--set {shlex.quote(change)}" for change in changes)]
    )
    params.write_text(params_text(config, [*found.header, f"Written by: {command}"], reasons), encoding="utf-8")
    return config


def load_profile(profile: str, changes: Iterable[str] = (), configs: Path = CONFIGS) -> Config:
    """The parameters of a profile with changes, as :func:`configure` takes them; nothing is written.

    Raises:
        ConfigError: as :func:`configure`.
    """
    return _with_changes(read_profile(profile, configs).config, list(changes), f"{configs / profile}.yaml")


def changed_config(changes: Iterable[str], params: Path = paths.PARAMS) -> Config:
    """The parameters of ``params.yaml``, or another parameter file, with changes as :func:`configure` takes them; nothing is written.

    Raises:
        ConfigError: as :func:`configure`; also if there is no such file.
    """
    return _with_changes(load_config(params), list(changes), str(params))


def _with_changes(config: Config, changes: list[str], origin: str) -> Config:
    if not changes:
        return config
    tree = config.model_dump(by_alias=True)
    for change in changes:
        _assign(tree, change)
    return parse_config(tree, f"{origin} with {' '.join(changes)}")


def _assign(tree: dict[str, Any], change: str) -> None:
    """Apply ``section.key=value`` to a complete tree."""
    path, equals, text = change.partition("=")
    path = path.strip()
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{change!r} is not KEY=VALUE, for example pretrain.steps=2000")
    if new := current_name(path):
        raise ConfigError(f"--set {change}: {path} is now called {new}")
    value = parse_yaml(text, f"--set {change}: the value")
    for number, key in enumerate(keys):
        section, here = ".".join(keys[:number]), ".".join(keys[: number + 1])
        if section_class(section) and key not in tree:
            raise ConfigError(f"--set {change}: {unknown_key(here)}")
        if number == len(keys) - 1:
            tree[key] = _merged(tree[key], value, here) if section_class(here) and isinstance(value, dict) else value
        else:
            tree = tree.setdefault(key, {})
            if not isinstance(tree, dict):
                raise ConfigError(f"--set {change}: {here} is not a section")
