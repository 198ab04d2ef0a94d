"""Profiles: complete parameter files in ``configs/`` from which ``params.yaml`` is written."""

from __future__ import annotations

from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from cm3leon.config.schema import Config, ConfigError, parse_config

CONFIGS = Path("configs")
PARAMS = Path("params.yaml")


def profile_names(configs: Path = CONFIGS) -> list[str]:
    """Names of the profiles there are."""
    return sorted(path.stem for path in configs.glob("*.yaml"))


def profile_file(profile: str, configs: Path = CONFIGS) -> Path:
    """The file of a profile.

    Raises:
        ConfigError: if there is none; the message lists those there are.
    """
    source = configs / f"{profile}.yaml"
    if not source.is_file():
        raise ConfigError(f"there is no profile {profile!r}; {configs}/ has: {', '.join(profile_names(configs)) or 'none'}")
    return source


def configure(profile: str, changes: Iterable[str] = (), configs: Path = CONFIGS, params: Path = PARAMS) -> Config:
    """Write ``params.yaml`` from a profile with ``key.path=value`` changes, comments kept; nothing is written unless all is valid.

    Values are YAML: ``pretrain.steps=2000``, ``sft.tasks={caption: 1.0}``, ``ingest.source=folder``.

    Raises:
        ConfigError: for an unknown profile or key, a change that is no assignment, or an impossible value.
    """
    text, config = _changed(profile_file(profile, configs), list(changes))
    params.write_text(text)
    return config


def changed_config(changes: Iterable[str], params: Path = PARAMS) -> Config:
    """What ``params.yaml``, or another parameter file, says with some changes, as :func:`configure` takes them; nothing is written.

    Raises:
        ConfigError: as :func:`configure`; also if there is no such file.
    """
    if not params.is_file():
        raise ConfigError(f"{params} does not exist; write it with: cm3leon configure small")
    return _changed(params, list(changes))[1]


def _changed(source: Path, changes: list[str]) -> tuple[str, Config]:
    """The text of a parameter file with changes, comments kept, and what it says."""
    text = source.read_text()
    if not changes:
        return text, parse_config(yaml.safe_load(text), str(source))
    from ruamel.yaml import YAML

    editor = YAML()
    editor.width = 140
    editor.preserve_quotes = True
    editor.representer.add_representer(type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null"))
    tree = editor.load(text)
    for change in changes:
        _assign(tree, change)
    out = StringIO()
    editor.dump(tree, out)
    return out.getvalue(), parse_config(yaml.safe_load(out.getvalue()), f"{source} with {' '.join(changes)}")


def _assign(tree: Any, change: str) -> None:
    """Apply ``section.key=value``; missing last keys are added (validation then says whether they exist)."""
    path, equals, value = change.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{change!r} is not KEY=VALUE, for example pretrain.steps=2000")
    for number, key in enumerate(keys[:-1]):
        if not isinstance(tree.get(key), dict):
            raise ConfigError(f"{change!r}: {'.'.join(keys[: number + 1])} is not a section")
        tree = tree[key]
    try:
        tree[keys[-1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{change!r}: the value is not YAML: {error}") from None
