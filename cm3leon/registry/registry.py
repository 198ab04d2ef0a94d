"""The model registry in MLflow: register a bundle as challenger, list the versions, fetch a bundle. Versions are named by aliases."""

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

from cm3leon.config.schema import Config
from cm3leon.evaluation.record import Record
from cm3leon.registry import release
from cm3leon.registry.bundle import Bundle, build_bundle, bundle_hash
from cm3leon.registry.local import find_model, read_versions
from cm3leon.registry.packaging import log_version
from cm3leon.tracking import store
from cm3leon.tracking.runs import PARENT_RUN_ENV, VERSION_TAG
from cm3leon.tracking.sqlite import sqlite_file
from cm3leon.utils.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL_NAME = "cm3leon"
CHAMPION = "champion"
CHALLENGER = "challenger"
PREVIOUS_CHAMPION = "previous_champion"

HASH_TAG = "bundle_hash"
SCRATCH = Path(".cache")
"""For a bundle until it is registered: on the project's own disk, because a bundle can be as large as the models."""


class NotRegisteredError(UserError):
    """The registry does not exist or has no such model."""


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


def connect(uri: str | None = None) -> MlflowClient:
    """A client of the store at ``uri``; None prepares and takes the project's."""
    uri = uri or store.prepare_store()
    store.use_settings()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _version(entity: Any, aliases: list[str]) -> Version:
    scores = {name.removeprefix("eval/"): float(value) for name, value in entity.tags.items() if name.startswith("eval/")}
    tags = {name: value for name, value in entity.tags.items() if not name.startswith("eval/")}
    created = datetime.fromtimestamp(entity.creation_timestamp / 1000, UTC)
    return Version(str(entity.version), entity.run_id, created, aliases, scores, tags)


def all_versions(client: MlflowClient) -> list[Version]:
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


def holder(versions: list[Version], alias: str) -> Version | None:
    """The version that has an alias; None if no version has it."""
    return next((version for version in versions if alias in version.aliases), None)


def find_version(client: MlflowClient, name: str) -> Version:
    """A version by its number, or by an alias: ``3``, ``@champion``.

    Raises:
        NotRegisteredError: if there is none.
    """
    versions = all_versions(client)
    found = holder(versions, name[1:]) if name.startswith("@") else next((v for v in versions if v.number == name), None)
    if found is None:
        known = ", ".join([v.number for v in versions] + sorted(f"@{alias}" for v in versions for alias in v.aliases)) or "none"
        raise NotRegisteredError(
            f"the registry {store.without_password(client.tracking_uri)} has no version {name} of {MODEL_NAME}; it has: {known}"
        )
    return found


def status(uri: str | None = None) -> list[Version]:
    """All versions with aliases, scores, tags and time of creation, newest first."""
    local = read_versions(uri or store.tracking_uri(), MODEL_NAME)
    return all_versions(connect(uri)) if local is None else [_version(row, row.aliases) for row in local]


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
    client = connect()
    before = all_versions(client)
    version = next((v for v in before if v.tags.get(HASH_TAG) == content), None)
    if version:
        number = version.number
    else:
        # Tags, because a listing of versions shows them without a request for each run. As metrics, ``evaluate`` has logged the scores.
        headline = {f"eval/{name}": f"{score:.6g}" for name, score in bundle.record.scores.items() if "/" not in name}
        tags = {HASH_TAG: content, "profile": config.profile, **headline}
        number = log_version(client, bundle.path, MODEL_NAME, tags, config)
    client.set_registered_model_alias(MODEL_NAME, CHALLENGER, number)
    _link_pipeline(client, number)
    versions = [replace(v, record=bundle.record) if v.number == number else v for v in all_versions(client)]
    publish_changed(client, before, versions)
    return next(v for v in versions if v.number == number)


def _link_pipeline(client: MlflowClient, number: str) -> None:
    """Make the version's model an output of the pipeline's run, if this process runs one; its page then links to the version."""
    run_id = os.environ.get(PARENT_RUN_ENV)
    if run_id is None:
        return
    from mlflow.entities import LoggedModelOutput

    client.set_tag(run_id, VERSION_TAG, f"{MODEL_NAME}/{number}")
    source = str(client.get_model_version(MODEL_NAME, number).source)  # models:/MODEL_ID; MLflow's own field model_id is empty
    client.log_outputs(run_id, [LoggedModelOutput(source.removeprefix("models:/"), step=0)])


def publish_changed(client: MlflowClient, before: list[Version], versions: list[Version]) -> None:
    """Write the releases anew of the versions that are new or have other aliases than before; one that cannot be written is a warning."""
    from mlflow.exceptions import MlflowException

    aliases = {version.number: version.aliases for version in before}
    for version in versions:
        if version.aliases != aliases.get(version.number):
            try:
                publish(client, version)
            except (UserError, OSError, ValueError, KeyError, MlflowException) as error:  # of a run that was deleted, for example
                store.warn(f"the release of version {version} is not up to date ({type(error).__name__}: {error})")


def publish(client: MlflowClient, version: Version) -> None:
    """Write the version's release anew (:func:`cm3leon.registry.release.publish`)."""
    if version.run_id:
        release.publish(client, MODEL_NAME, version.number, version.run_id, version.aliases, version.record)


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
    if model := find_model(tracking_uri or store.tracking_uri(), uri):
        return model / _bundle_path(model / "MLmodel")
    client, entity = _registered(uri, tracking_uri)
    content = entity.tags.get(HASH_TAG, f"{entity.name}-{entity.version}")
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cm3leon" / "bundles" / content
    return cached if cached.is_dir() else _download(client, entity, cached)


def _registered(uri: str, tracking_uri: str | None = None) -> tuple[MlflowClient, Any]:
    """The registry's client, and MLflow's entity of the version that a ``models:/`` URI names."""
    file = sqlite_file(store.tracking_uri()) if tracking_uri is None else None
    if file and not file.exists():
        raise NotRegisteredError(f"there is no model registry {file.absolute()}; run the pipeline first, or set MLFLOW_TRACKING_URI")
    client = connect(tracking_uri)
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


def bundle_file(client: MlflowClient, number: str, name: str) -> bytes:
    """The content of one file of a version's bundle, without the rest.

    Args:
        name: its path in the bundle.

    Raises:
        FileNotFoundError: if the bundle has no such file.
    """
    from mlflow.exceptions import MlflowException

    model = client.get_model_version_download_uri(MODEL_NAME, number)
    with tempfile.TemporaryDirectory() as folder:
        try:
            description = _artifact(client, f"{model}/MLmodel", folder)
            found = _artifact(client, f"{model}/{_bundle_path(description)}/{name}", folder)
        except MlflowException as error:
            raise FileNotFoundError(f"the bundle of version {number} has no file {name}: {error}") from None
        if not found.is_file():
            raise FileNotFoundError(f"the bundle of version {number} has no file {name}")
        return found.read_bytes()


def _artifact(client: MlflowClient, uri: str, target: str | None = None) -> Path:
    from mlflow.artifacts import download_artifacts

    return Path(download_artifacts(uri, dst_path=target, tracking_uri=client.tracking_uri))


def _bundle_path(description: Path) -> str:
    """Where the bundle is in a model, as the model's ``MLmodel`` says."""
    import yaml

    path: str = yaml.safe_load(description.read_text())["flavors"]["python_function"]["artifacts"]["bundle"]["path"]
    return path


def _download(client: MlflowClient, entity: Any, cached: Path) -> Path:
    """The bundle of a registered version: in the store if that is on this disk, else downloaded to ``cached``."""
    # Not by its models: URI, for which MLflow opens the store of the working directory, or makes one.
    uri = client.get_model_version_download_uri(entity.name, entity.version)
    here = uri.startswith(("file:", "/"))
    # A download becomes visible only when it is complete.
    partial = cached.with_name(f"{cached.name}.{os.getpid()}.partial")
    try:
        model = _artifact(client, uri, None if here else str(partial))
        bundle = model / _bundle_path(model / "MLmodel")
        if here:
            return bundle
        # Another process may have downloaded the same bundle meanwhile.
        if not cached.is_dir():
            bundle.rename(cached)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return cached
