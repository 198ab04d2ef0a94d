"""The model registry: register a bundle as challenger, gate it, promote it, roll back, fetch. All by aliases, in MLflow.

    version = register(build_bundle(Path(".cache/bundle")))
    if gate(config.gate).passed:
        promote()

Each step can be repeated: what is already so stays so.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cm3leon.config.schema import Config, GateConfig, load_config
from cm3leon.evaluation.record import Record
from cm3leon.registry.bundle import BundleError, IncompleteRecordError, build_bundle, bundle_hash, read_record
from cm3leon.registry.gate import Verdict, compare
from cm3leon.registry.packaging import log_version
from cm3leon.tracking import store
from cm3leon.utils.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["BundleError", "IncompleteRecordError", "build_bundle", "bundle_hash"]  # re-exported: one import for the whole of promotion

MODEL_NAME = "cm3leon"
CHAMPION = "champion"
CHALLENGER = "challenger"
PREVIOUS_CHAMPION = "previous_champion"

HASH_TAG, GATE_TAG, REPLACED_TAG, ROLLED_BACK_TAG = "bundle_hash", "gate", "replaced", "rolled_back"


class NotRegisteredError(UserError):
    """The registry does not exist or has no such model."""


class PromotionError(UserError):
    """A promotion or rollback is not possible as things are; the message says why."""


@dataclass(frozen=True)
class Version:
    """A registered version; ``str`` gives its number."""

    number: str
    run_id: str | None
    created: datetime
    aliases: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.number


def _client(uri: str | None = None) -> MlflowClient:
    uri = uri or store.prepare_store()
    store.use_settings()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _version(entity: Any, aliases: list[str]) -> Version:
    scores = {name.removeprefix("eval/"): float(value) for name, value in entity.tags.items() if name.startswith("eval/")}
    tags = {name: value for name, value in entity.tags.items() if not name.startswith("eval/")}
    created = datetime.fromtimestamp(entity.creation_timestamp / 1000, UTC)
    return Version(str(entity.version), entity.run_id, created, aliases, scores, tags)


def _versions(client: MlflowClient) -> list[Version]:
    """All versions, newest first."""
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(MODEL_NAME).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return []
        raise
    named: dict[str, list[str]] = {}
    for alias, number in aliases.items():
        named.setdefault(str(number), []).append(alias)
    found, token = [], None
    while True:
        page = client.search_model_versions(f"name='{MODEL_NAME}'", page_token=token)
        found += [_version(entity, sorted(named.get(str(entity.version), []))) for entity in page]
        token = page.token
        if not token:
            return sorted(found, key=lambda v: -int(v.number))


def _holder(versions: list[Version], alias: str) -> Version | None:
    return next((version for version in versions if alias in version.aliases), None)


def status(uri: str | None = None) -> list[Version]:
    """All versions with aliases, scores, tags and time of creation, newest first."""
    return _versions(_client(uri))


# --- register --------------------------------------------------------------------------------------------------------


def register(bundle: Path, config: Config | None = None) -> Version:
    """Make a bundle a version of the registered model with alias ``challenger``.

    A bundle whose content is registered already makes no new version: that version becomes the challenger.

    Raises:
        IncompleteRecordError: if the bundle's evaluation record is not complete.
        ConnectionError: if the registry is not reachable.
    """
    bundle = Path(bundle)
    record = read_record(bundle)
    content = bundle_hash(bundle)
    client = _client()
    version = next((v for v in _versions(client) if v.tags.get(HASH_TAG) == content), None)
    if version:
        number = version.number
    else:
        config = config or load_config()
        headline = {f"eval/{name}": f"{value:.6g}" for name, value in record.scores.items() if "/" not in name}
        tags = {HASH_TAG: content, "profile": config.profile, **headline}
        number = log_version(client, bundle, MODEL_NAME, tags, record.scores, config)
    client.set_registered_model_alias(MODEL_NAME, CHALLENGER, number)
    return next(v for v in _versions(client) if v.number == number)


# --- gate and promotion ----------------------------------------------------------------------------------------------


def _challenger(versions: list[Version]) -> Version:
    challenger = _holder(versions, CHALLENGER)
    if challenger is None:
        raise PromotionError("no version has the alias challenger; run: cm3leon register")
    return challenger


def _record(client: MlflowClient, version: Version) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        return read_record(Path(client.download_artifacts(version.run_id, "evaluation", folder)).parent)


def gate(config: GateConfig) -> Verdict:
    """Compare the challenger with the champion (``cm3leon/registry/gate.py``); the verdict is kept with the challenger's run.

    Raises:
        PromotionError: if there is no challenger.
        IncompleteRecordError: if a record was not kept whole.
    """
    client = _client()
    versions = _versions(client)
    challenger, champion = _challenger(versions), _holder(versions, CHAMPION)
    refusals = []
    if ROLLED_BACK_TAG in challenger.tags and challenger != champion:
        refusals.append(f"version {challenger} was the champion and was rolled back")
    verdict = compare(
        config,
        (challenger.number, _record(client, challenger)),
        (champion.number, _record(client, champion)) if champion else None,
        refusals,
    )
    client.log_text(challenger.run_id, verdict.to_markdown(), "gate.md")
    client.log_text(challenger.run_id, verdict.to_json(), "gate.json")
    client.set_model_version_tag(MODEL_NAME, challenger.number, GATE_TAG, _gate_tag(verdict.passed, champion))
    return verdict


def _gate_tag(passed: bool, champion: Version | None) -> str:
    return f"{'passed' if passed else 'held back'} against {f'version {champion}' if champion else 'no champion'}"


def promote(force: bool = False) -> Version:
    """Make the challenger the champion and remember the one before. If it is the champion already nothing changes.

    Args:
        force: also if the gate did not pass it against the present champion.

    Raises:
        PromotionError: if there is no challenger, or the gate has not passed it.
    """
    client = _client()
    versions = _versions(client)
    challenger, champion = _challenger(versions), _holder(versions, CHAMPION)
    if champion is not None and champion.number == challenger.number:
        return champion
    if not force and challenger.tags.get(GATE_TAG) != _gate_tag(True, champion):
        found = challenger.tags.get(GATE_TAG, "has not been to the gate")
        raise PromotionError(f"version {challenger} is not promoted: {found}, and the champion is {champion or 'none'}; run: cm3leon gate")
    if champion is not None:
        client.set_model_version_tag(MODEL_NAME, challenger.number, REPLACED_TAG, champion.number)
        client.set_registered_model_alias(MODEL_NAME, PREVIOUS_CHAMPION, champion.number)
    if ROLLED_BACK_TAG in challenger.tags:
        client.delete_model_version_tag(MODEL_NAME, challenger.number, ROLLED_BACK_TAG)
    client.set_registered_model_alias(MODEL_NAME, CHAMPION, challenger.number)
    return next(v for v in _versions(client) if v.number == challenger.number)


def rollback() -> Version:
    """Undo the last promotion: the previous champion is the champion again, and the one before it the previous champion.

    The version rolled back is marked, so that the next gate does not promote it again.

    Raises:
        PromotionError: if there is no previous champion.
    """
    client = _client()
    versions = _versions(client)
    champion, previous = _holder(versions, CHAMPION), _holder(versions, PREVIOUS_CHAMPION)
    if champion is None or previous is None:
        raise PromotionError("there is no previous champion to go back to")
    client.set_model_version_tag(MODEL_NAME, champion.number, ROLLED_BACK_TAG, f"to version {previous}")
    client.set_registered_model_alias(MODEL_NAME, CHAMPION, previous.number)
    before = previous.tags.get(REPLACED_TAG)
    if before in {v.number for v in versions} and before != previous.number:
        client.set_registered_model_alias(MODEL_NAME, PREVIOUS_CHAMPION, before)
    else:
        client.delete_registered_model_alias(MODEL_NAME, PREVIOUS_CHAMPION)
    return next(v for v in _versions(client) if v.number == previous.number)


# --- fetch -----------------------------------------------------------------------------------------------------------


def fetch_bundle(uri: str = f"models:/{MODEL_NAME}@{CHAMPION}", tracking_uri: str | None = None) -> Path:
    """The bundle directory of a registered model: in place in a local store, else downloaded once into the user's cache.

    Args:
        uri: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        tracking_uri: the store; None takes ``MLFLOW_TRACKING_URI`` or ``./mlflow.db``.

    Raises:
        NotRegisteredError: if the registry has no such model.
        ConnectionError: if the registry is not reachable.
    """
    local = store.tracking_uri()
    if tracking_uri is None and local.startswith("sqlite:///") and not Path(local.removeprefix("sqlite:///")).exists():
        raise NotRegisteredError(f"no model registry at {local}; run the pipeline first, or set MLFLOW_TRACKING_URI")
    client = _client(tracking_uri)
    from mlflow.exceptions import MlflowException

    name, _, alias = uri.removeprefix("models:/").partition("@")
    try:
        if alias:
            entity = client.get_model_version_by_alias(name, alias)
        else:
            entity = client.get_model_version(*name.split("/", 1))
    except (MlflowException, TypeError) as error:
        raise NotRegisteredError(f"the registry {client.tracking_uri} has no model {uri}: {error}") from None
    content = entity.tags.get(HASH_TAG, f"{entity.name}-{entity.version}")
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cm3leon" / "bundles" / content
    return cached if cached.is_dir() else _download(client, entity, cached)


def find_bundle(model: str) -> Path:
    """The bundle directory that ``model`` names: that of a registered model (``models:/NAME@ALIAS``), or a path as it is.

    Raises:
        NotRegisteredError: if the registry has no such model.
    """
    if not model.startswith("models:/"):
        return Path(model)
    try:
        return fetch_bundle(model)
    except NotRegisteredError as error:
        hint = "; there is no champion yet: run make run first" if model.endswith(f"@{CHAMPION}") else ""
        raise NotRegisteredError(f"{error}{hint}") from None


def _download(client: MlflowClient, entity: Any, cached: Path) -> Path:
    """The bundle of a registered version: where it lies if the store is on this disk, else downloaded to ``cached``."""
    import yaml
    from mlflow.artifacts import download_artifacts

    here = client.get_model_version_download_uri(entity.name, entity.version).startswith(("file:", "/"))
    partial = cached.with_name(f"{cached.name}.{os.getpid()}.partial")
    uri = f"models:/{entity.name}/{entity.version}"
    target = None if here else str(partial)
    model = Path(download_artifacts(uri, dst_path=target, tracking_uri=client.tracking_uri, registry_uri=client.tracking_uri))
    described = yaml.safe_load((model / "MLmodel").read_text())
    bundle = model / described["flavors"]["python_function"]["artifacts"]["bundle"]["path"]
    if here:
        return bundle
    if not cached.is_dir():
        bundle.rename(cached)
    shutil.rmtree(partial)
    return cached
