"""The model registry: register a bundle as challenger, gate it, promote it, roll back, fetch. All by aliases, in MLflow.

    version = register_outputs(config)
    if gate(config.gate, version).passed:
        promote()

The evaluation record is read once on its way to the gate: when the bundle is built. Each step is idempotent.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cm3leon.config.schema import Config, GateConfig
from cm3leon.evaluation.record import Record
from cm3leon.registry.bundle import Bundle, build_bundle, bundle_hash, read_record
from cm3leon.registry.gate import Verdict, compare
from cm3leon.registry.packaging import log_version
from cm3leon.tracking import store
from cm3leon.tracking.sqlite import sqlite_file
from cm3leon.utils.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL_NAME = "cm3leon"
CHAMPION = "champion"
CHALLENGER = "challenger"
PREVIOUS_CHAMPION = "previous_champion"

HASH_TAG, GATE_TAG, REPLACED_TAG, ROLLED_BACK_TAG = "bundle_hash", "gate", "replaced", "rolled_back"
SCRATCH = Path(".cache")
"""For a bundle until it is registered: on the project's own disk, because a bundle can be as large as the models."""


class NotRegisteredError(UserError):
    """The registry does not exist or has no such model."""


class PromotionError(UserError):
    """A promotion or rollback is not possible; the message says why."""


@dataclass(frozen=True)
class Version:
    """A registered version; ``str`` gives its number.

    Attributes:
        number: from 1.
        run_id: the MLflow run ``register`` that logged it.
        created: UTC.
        aliases: sorted.
        scores: the headline scores of its evaluation, from its tags; all scores are in its evaluation record.
        tags: its other tags.
        record: its evaluation record, where this process has just registered it.
    """

    number: str
    run_id: str | None
    created: datetime
    aliases: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    record: Record | None = field(default=None, compare=False, repr=False)

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
    aliases_of: dict[str, list[str]] = {}
    for alias, number in aliases.items():
        aliases_of.setdefault(str(number), []).append(alias)
    found, token = [], None
    while True:
        page = client.search_model_versions(f"name='{MODEL_NAME}'", page_token=token)
        found += [_version(entity, sorted(aliases_of.get(str(entity.version), []))) for entity in page]
        token = page.token
        if not token:
            return sorted(found, key=lambda v: -int(v.number))


def _holder(versions: list[Version], alias: str) -> Version | None:
    return next((version for version in versions if alias in version.aliases), None)


def status(uri: str | None = None) -> list[Version]:
    """All versions with aliases, scores, tags and time of creation, newest first."""
    return _versions(_client(uri))


# --- register --------------------------------------------------------------------------------------------------------


def register_outputs(config: Config) -> Version:
    """Bundle the stages' outputs and register them (:func:`register`).

    Raises:
        BundleError: if there is no bundle to be built of them, as :func:`build_bundle` says.
        ConnectionError: if the registry is not reachable.
    """
    SCRATCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bundle-", dir=SCRATCH) as folder:
        return register(build_bundle(Path(folder) / "bundle", config), config)


def register(bundle: Bundle, config: Config) -> Version:
    """Make a bundle a version of the registered model with alias ``challenger``.

    A bundle whose content is already registered makes no new version: that version becomes the challenger.

    Raises:
        ConnectionError: if the registry is not reachable.
    """
    content = bundle_hash(bundle.path)
    client = _client()
    version = next((v for v in _versions(client) if v.tags.get(HASH_TAG) == content), None)
    if version:
        number = version.number
    else:
        # Tags, because a listing of versions shows them without a request for each run. As metrics, ``evaluate`` has logged the scores.
        headline = {f"eval/{name}": f"{score:.6g}" for name, score in bundle.record.scores.items() if "/" not in name}
        tags = {HASH_TAG: content, "profile": config.profile, **headline}
        number = log_version(client, bundle.path, MODEL_NAME, tags, config)
    client.set_registered_model_alias(MODEL_NAME, CHALLENGER, number)
    return replace(next(v for v in _versions(client) if v.number == number), record=bundle.record)


# --- gate and promotion ----------------------------------------------------------------------------------------------


def _challenger(versions: list[Version]) -> Version:
    challenger = _holder(versions, CHALLENGER)
    if challenger is None:
        raise PromotionError("no version of the model has the alias challenger; run: cm3leon register")
    return challenger


def _run_id(version: Version) -> str:
    if version.run_id is None:
        raise PromotionError(f"version {version} has no run, so no evaluation record; register the model by: cm3leon register")
    return version.run_id


def _record(client: MlflowClient, version: Version) -> Record:
    """The evaluation record that was registered with a version."""
    with tempfile.TemporaryDirectory() as folder:
        return read_record(Path(client.download_artifacts(_run_id(version), "evaluation", folder)))


def gate(config: GateConfig, registered: Version | None = None) -> Verdict:
    """Compare the challenger with the champion (``cm3leon/registry/gate.py``); the verdict is logged to the challenger's run.

    Args:
        registered: the challenger as :func:`register` returned it, with its record; None reads the record from the registry.

    Raises:
        PromotionError: if there is no challenger, or a version has no run.
        IncompleteRecordError: if a record in the registry is damaged.
    """
    client = _client()
    versions = _versions(client)
    challenger, champion = _challenger(versions), _holder(versions, CHAMPION)
    refusals = []
    if ROLLED_BACK_TAG in challenger.tags and challenger != champion:
        refusals.append(f"version {challenger} was the champion and was rolled back")
    known = registered.record if registered and registered.number == challenger.number else None
    record = known or _record(client, challenger)
    # Registering an unchanged model again makes the champion the challenger.
    against = (champion.number, record if champion == challenger else _record(client, champion)) if champion else None
    verdict = compare(config, (challenger.number, record), against, refusals)
    client.log_text(_run_id(challenger), verdict.to_markdown(), "gate.md")
    client.log_text(_run_id(challenger), verdict.to_json(), "gate.json")
    client.set_model_version_tag(MODEL_NAME, challenger.number, GATE_TAG, _gate_tag(verdict.passed, champion))
    return verdict


def _gate_tag(passed: bool, champion: Version | None) -> str:
    return f"{'passed' if passed else 'held back'} against {f'version {champion}' if champion else 'no champion'}"


def promote(force: bool = False) -> Version:
    """Make the challenger the champion and the champion the previous champion; no change if the challenger is the champion.

    Args:
        force: promote also a challenger that the gate has not passed against the present champion.

    Raises:
        PromotionError: if there is no challenger, or the gate has not passed it.
    """
    client = _client()
    versions = _versions(client)
    challenger, champion = _challenger(versions), _holder(versions, CHAMPION)
    if champion is not None and champion.number == challenger.number:
        return champion
    if not force and challenger.tags.get(GATE_TAG) != _gate_tag(True, champion):
        state = challenger.tags.get(GATE_TAG, "not compared by the gate yet")
        against = f"version {champion}" if champion else "none"
        raise PromotionError(f"version {challenger} is not promoted: {state}; the champion is {against}; run: cm3leon gate")
    if champion is not None:
        client.set_model_version_tag(MODEL_NAME, challenger.number, REPLACED_TAG, champion.number)
        client.set_registered_model_alias(MODEL_NAME, PREVIOUS_CHAMPION, champion.number)
    if ROLLED_BACK_TAG in challenger.tags:
        client.delete_model_version_tag(MODEL_NAME, challenger.number, ROLLED_BACK_TAG)
    client.set_registered_model_alias(MODEL_NAME, CHAMPION, challenger.number)
    return next(v for v in _versions(client) if v.number == challenger.number)


def rollback() -> Version:
    """Undo the last promotion: the previous champion is the champion again, and the one before it the previous champion.

    The version that was rolled back is tagged, so that the gate does not pass it again.

    Raises:
        PromotionError: if there is no previous champion.
    """
    client = _client()
    versions = _versions(client)
    champion, previous = _holder(versions, CHAMPION), _holder(versions, PREVIOUS_CHAMPION)
    if champion is None or previous is None:
        raise PromotionError("there is no previous champion to roll back to; cm3leon status lists the versions and their aliases")
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
    """The bundle directory of a registered model: that of a local store, else one downloaded once into the user's cache.

    Args:
        uri: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        tracking_uri: the store; None takes ``MLFLOW_TRACKING_URI`` or ``./mlflow.db``.

    Raises:
        NotRegisteredError: if the registry has no such model.
        ConnectionError: if the registry is not reachable.
    """
    client, entity = _registered(uri, tracking_uri)
    content = entity.tags.get(HASH_TAG, f"{entity.name}-{entity.version}")
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cm3leon" / "bundles" / content
    return cached if cached.is_dir() else _download(client, entity, cached)


def _registered(uri: str, tracking_uri: str | None = None) -> tuple[MlflowClient, Any]:
    """The registry's client, and MLflow's entity of the version that a ``models:/`` URI names."""
    file = sqlite_file(store.tracking_uri()) if tracking_uri is None else None
    if file and not file.exists():
        raise NotRegisteredError(f"there is no model registry {file.absolute()}; run the pipeline first, or set MLFLOW_TRACKING_URI")
    client = _client(tracking_uri)
    from mlflow.exceptions import MlflowException

    name, _, alias = uri.removeprefix("models:/").partition("@")
    try:
        entity = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(*name.split("/", 1))
    except (MlflowException, TypeError) as error:
        raise NotRegisteredError(f"the registry {store.without_password(client.tracking_uri)} has no model {uri}: {error}") from None
    return client, entity


def pinned(model: str) -> str:
    """A registered model by its number, ``models:/NAME/VERSION``, where ``model`` may name it by an alias; a directory is unchanged.

    Raises:
        NotRegisteredError: if the registry has no such model.
        ConnectionError: if the registry is not reachable.
    """
    if not model.startswith("models:/"):
        return model
    with _hint(model):
        _, entity = _registered(model)
    return f"models:/{entity.name}/{entity.version}"


def find_bundle(model: str) -> Path:
    """The bundle directory of a registered model (``models:/NAME@ALIAS``); any other ``model`` is the directory itself.

    Raises:
        NotRegisteredError: if the registry has no such model.
    """
    if not model.startswith("models:/"):
        return Path(model)
    with _hint(model):
        return fetch_bundle(model)


@contextmanager
def _hint(model: str) -> Iterator[None]:
    """Say what to do in a project that has no champion yet."""
    try:
        yield
    except NotRegisteredError as error:
        hint = "; there is no champion yet: run make run first" if model.endswith(f"@{CHAMPION}") else ""
        raise NotRegisteredError(f"{error}{hint}") from None


def _download(client: MlflowClient, entity: Any, cached: Path) -> Path:
    """The bundle of a registered version: in the store if that is on this disk, else downloaded to ``cached``."""
    import yaml
    from mlflow.artifacts import download_artifacts

    # Not by its models: URI, for which MLflow opens the store of the working directory, or makes one.
    uri = client.get_model_version_download_uri(entity.name, entity.version)
    here = uri.startswith(("file:", "/"))
    # A download becomes visible only when it is complete.
    partial = cached.with_name(f"{cached.name}.{os.getpid()}.partial")
    model = Path(download_artifacts(uri, dst_path=None if here else str(partial), tracking_uri=client.tracking_uri))
    description = yaml.safe_load((model / "MLmodel").read_text())
    bundle: Path = model / description["flavors"]["python_function"]["artifacts"]["bundle"]["path"]
    if here:
        return bundle
    # Another process may have downloaded the same bundle meanwhile.
    if not cached.is_dir():
        bundle.rename(cached)
    shutil.rmtree(partial)
    return cached
