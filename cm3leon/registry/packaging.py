"""A bundle as a version of an MLflow model: a model from code, so that nothing is pickled, with a copy of this package's code."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cm3leon
from cm3leon.config.schema import Config, DecodingConfig
from cm3leon.registry import release
from cm3leon.registry.bundle import LINEAGE
from cm3leon.registry.signature import signature
from cm3leon.tracking import runs
from cm3leon.tracking.store import without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient

PACKAGE = Path(cm3leon.__file__).parent
REQUIREMENTS = (
    "mlflow", "torch", "torchvision", "open_clip_torch", "faiss-cpu", "numpy", "pandas", "pyarrow", "pillow",
    "pydantic", "pyyaml", "rich", "safetensors", "tokenizers",
)  # fmt: skip
"""Packages that a registered model needs to load and predict; registered with the versions installed here."""
EXAMPLE = {"task": "text_to_image", "prompt": "a red circle left of a blue square"}
"""The request that MLflow shows with the model."""


def log_version(client: MlflowClient, bundle: Path, name: str, tags: Mapping[str, str], config: Config) -> str:
    """Log the bundle in a run ``register`` with its evaluation and lineage, and make it a version of model ``name``.

    Returns the version's number.

    Raises:
        ConnectionError: if the store takes no runs.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    with runs.recorded_run("register", config) as run:
        if run.run_id is None:
            store = without_password(client.tracking_uri)
            raise ConnectionError(f"the MLflow store {store} takes no runs, so nothing can be registered")
        with _global_store(client.tracking_uri), mlflow.start_run(run_id=run.run_id, nested=True):
            model = log_model(bundle, name)
            remove_local_paths(client, model.model_id)
        client.log_artifacts(run.run_id, str(bundle / "evaluation"), "evaluation")
        client.log_artifact(run.run_id, str(bundle / LINEAGE))
        release.log_facts(client, run.run_id, bundle)
        try:
            client.create_registered_model(name, description="CM3leon: generates images, captions and answers. Load it by alias.")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        with _global_store(client.tracking_uri):  # where MLflow looks for the logged model
            version = client.create_model_version(name, model.model_uri, run.run_id, tags=dict(tags), model_id=model.model_id)
        return str(version.version)


@contextmanager
def _global_store(uri: str) -> Iterator[None]:
    """Make ``uri`` the store of MLflow's fluent API, which knows one per process and its children, while the block runs.

    Both setters write the environment too, and a value set by hand equals its variable: restoring the variables restores both.
    """
    import mlflow

    before = {name: os.environ.pop(name, None) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # None unsets, which the annotation leaves out
        mlflow.set_registry_uri(None)  # type: ignore[arg-type]
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """Write no ``__pycache__`` while the block runs: MLflow tries the input example on the code where it lies, among the artifacts."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def log_model(bundle: Path, name: str) -> Any:
    """Log bundle and code as a pyfunc model of the active run; returns MLflow's model info."""
    import mlflow
    import pandas as pd

    decoding = DecodingConfig.model_validate_json((bundle / "decoding.json").read_text())
    with tempfile.TemporaryDirectory() as folder, _no_bytecode():
        code = Path(folder) / PACKAGE.name
        shutil.copytree(PACKAGE, code, ignore=shutil.ignore_patterns("__pycache__", "*.py[cod]"))
        return mlflow.pyfunc.log_model(
            name=name,
            python_model=str(PACKAGE / "serving" / "mlflow_model.py"),
            artifacts={"bundle": bundle.absolute().as_uri()},
            code_paths=[str(code)],
            pip_requirements=[f"{package}=={metadata.version(package).partition('+')[0]}" for package in REQUIREMENTS],
            signature=signature(decoding),
            input_example=pd.DataFrame([EXAMPLE]),
        )


def remove_local_paths(client: MlflowClient, model_id: str) -> None:
    """Rewrite a logged model's description without the paths of this computer, which its files are not loaded by."""
    from mlflow.artifacts import download_artifacts
    from mlflow.models import Model

    with tempfile.TemporaryDirectory() as folder:
        location = client.get_logged_model(model_id).artifact_location
        file = download_artifacts(f"{location}/MLmodel", dst_path=folder, tracking_uri=client.tracking_uri)
        description = Model.load(file)
        pyfunc = description.flavors["python_function"]
        pyfunc["model_code_path"] = Path(pyfunc["model_code_path"]).name
        for artifact in pyfunc["artifacts"].values():
            artifact["uri"] = artifact["path"]
        description.artifact_path = "."
        description.save(file)
        client.log_model_artifact(model_id, file)
