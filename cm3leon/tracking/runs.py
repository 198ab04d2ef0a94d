"""MLflow runs of stages and pipelines: parameters, metrics, artifacts, lineage.

    with runs.stage_run("pretrain", config) as run:
        run.log_metrics({"pretrain/loss": 1.2}, step=100)

A stage never fails because of tracking. Without a reachable store there is one warning and a run that records nothing. If the store stops
answering during the run, there is one warning, and metrics are buffered until it answers again; files that are logged meanwhile are lost,
and a warning at the end counts them. Without ``MLFLOW_TRACKING_URI`` the store
is ``./mlflow.db``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.tracking import lineage
from cm3leon.tracking.store import PROCESS_TAG, StoreError, experiment_id_of, prepare_store, tracking_uri, warn, without_password
from cm3leon.utils.processes import identity

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

PARENT_RUN_ENV = "CM3LEON_PARENT_RUN_ID"
FLOW_RUN_ENV = "CM3LEON_FLOW_RUN_ID"
VERSION_TAG = "registered_version"
"""Tag of a pipeline's run: the model version that it registered, NAME/NUMBER."""

BATCH_METRICS, BATCH_SECONDS = 50, 5.0
"""Metrics are sent when this many are buffered, or this long after the last time: a request costs as much for one as for many."""
RETRY_SECONDS = 60.0
"""How long to wait after a failed request before the next one."""
MAX_REQUEST_METRICS, MAX_REQUEST_PARAMS = 1000, 100
"""Most items that MLflow takes in a request."""
MAX_PARAM_CHARACTERS = 6000
"""Longer values of parameters are refused by MLflow."""
MAX_TAG_CHARACTERS = 8000
"""Longer values of tags are refused by MLflow."""
MAX_PENDING = 100_000
"""Metrics buffered while the store does not answer; older ones are dropped, and the final warning counts them."""


class Run:
    """A run being recorded. Without a client all methods do nothing, so that stages need no second path for untracked runs."""

    def __init__(self, client: MlflowClient | None = None, run_id: str | None = None, experiment_id: str | None = None) -> None:
        self.client, self.run_id, self.experiment_id = client, run_id, experiment_id
        self._metrics: list[Any] = []
        self._sent = time.monotonic()
        self._boot = time.time() - time.monotonic()
        self._failing_since: float | None = None
        self._lost = 0
        self._lost_calls = 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record metrics; they are buffered and sent together. NaN and infinite values are sent unchanged."""
        if self.client is None:
            return
        from mlflow.entities import Metric

        now = self._now()
        self._metrics += [Metric(name, float(value), now, step or 0) for name, value in metrics.items()]
        if len(self._metrics) >= BATCH_METRICS or time.monotonic() - self._sent >= BATCH_SECONDS:
            self.flush()

    def _now(self) -> int:
        """Milliseconds since 1970 by the clock as it was when the run began: one that is set back would make durations negative."""
        return int((self._boot + time.monotonic()) * 1000)

    def flush(self) -> None:
        """Send the buffered metrics. While the store does not answer they stay in the buffer, with a new attempt once a minute."""
        if self._waiting():
            return
        while self._metrics and self.client is not None:
            batch = self._metrics[:MAX_REQUEST_METRICS]
            if not self._try("log_batch", metrics=batch):
                self._lost += max(0, len(self._metrics) - MAX_PENDING)
                self._metrics = self._metrics[-MAX_PENDING:]
                break
            self._metrics = self._metrics[MAX_REQUEST_METRICS:]
        self._sent = time.monotonic()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters, nested ones under dotted names. In MLflow a parameter of a run cannot be changed."""
        if self.client is None:
            return
        from mlflow.entities import Param

        entities = [Param(name, value[:MAX_PARAM_CHARACTERS]) for name, value in flatten(params).items()]
        for start in range(0, len(entities), MAX_REQUEST_PARAMS):
            self._try("log_batch", params=entities[start : start + MAX_REQUEST_PARAMS])

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Store a file, or a directory with its contents, among the run's artifacts."""
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist and cannot be logged to MLflow")
        if path.is_dir():
            self._try("log_artifacts", str(path), folder or path.name)
        else:
            self._try("log_artifact", str(path), folder or None)

    def log_text(self, text: str, name: str) -> None:
        """Store a text as an artifact."""
        self._try("log_text", text, name)

    def log_image(self, path: str | Path, key: str, step: int = 0) -> None:
        """Store an image so that MLflow shows it beside those of the same key and step of other runs, and along the steps.

        Args:
            key: letters, digits, ``_ - . /`` and blanks.
        """
        if self.client is None:
            return
        from PIL import Image

        with Image.open(path) as image:
            self._try("log_image", image, key=key, step=step)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; those that the run has get the new value."""
        for name, value in tags.items():
            self._try("set_tag", name, value[:MAX_TAG_CHARACTERS])

    def rename(self, name: str) -> None:
        """Give the run another name."""
        self._try("update_run", name=name)

    def log_dataset(self, path: str | Path, name: str) -> None:
        """Record a dataset that the run reads. Its digest is DVC's md5 of the path, or "untracked" if ``dvc.lock`` has none."""
        if self.client is None:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        digest = lineage.dvc_md5(path) or "untracked"
        source = json.dumps({"uri": Path(path).absolute().as_uri()})
        dataset = Dataset(name=name, digest=digest[:36], source_type="local", source=source)
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "input")])]
        self._try("log_inputs", datasets=inputs)

    def finish(self, status: str) -> None:
        """Send the buffered metrics and end the run: FINISHED, FAILED or KILLED."""
        self._failing_since = None
        self.flush()
        self._try("set_terminated", status, self._now())
        if lost := self._lost + len(self._metrics):
            warn(f"{lost} metrics of MLflow run {self.run_id} could not be sent")
        if self._lost_calls:
            warn(f"{self._lost_calls} files, parameters or states of MLflow run {self.run_id} could not be sent")

    def _waiting(self) -> bool:
        """Whether the last request failed less than :data:`RETRY_SECONDS` ago."""
        return self._failing_since is not None and time.monotonic() - self._failing_since < RETRY_SECONDS

    def attempt(self, what: str, action: Callable[[MlflowClient], T], counted: bool = True) -> T | None:
        """The result of ``action`` with the client; None without a store, or if it fails. The first failure in a row is a warning.

        Args:
            counted: what is lost is counted here; metrics are counted by themselves.
        """
        if self.client is None:
            return None
        from mlflow.exceptions import MlflowException

        if self._waiting():  # an attempt takes seconds, in which the stage stands still
            self._lost_calls += counted
            return None
        try:
            result = action(self.client)
        except (MlflowException, OSError) as error:
            if self._failing_since is None:
                warn(f"MLflow's {what} of run {self.run_id} failed ({_first_line(error)}); the stage continues")
            self._failing_since = time.monotonic()
            self._lost_calls += counted
            return None
        self._failing_since = None
        return result

    def _try(self, method: str, *arguments: Any, **keywords: Any) -> bool:
        """Call the client's ``method`` for this run; returns whether it worked."""

        def call(client: MlflowClient) -> bool:
            getattr(client, method)(self.run_id, *arguments, **keywords)
            return True

        return self.attempt(method, call, counted="metrics" not in keywords) is not None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"model": {"layers": 4}} -> {"model.layers": "4"}; lists as JSON."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value)
    return flat


def stage_params(stage: str, config: Config) -> dict[str, Any]:
    """The parameters that a stage's run records: its own section and the seed; for any other name the whole configuration."""
    tree = config.model_dump(by_alias=True)
    wanted = {"evaluate": ["evaluate", "decoding"]}.get(stage, [stage])
    sections = {name: tree[name] for name in wanted if name in tree}
    return {**sections, "seed": config.seed} if sections else tree


@contextmanager
def recorded_run(name: str, config: Config) -> Iterator[Run]:
    """A run, child of the pipeline's run if there is one; ends FINISHED, FAILED on an exception, or KILLED if interrupted."""
    links = {"mlflow.parentRunId": os.environ.get(PARENT_RUN_ENV), "prefect.flow_run_id": os.environ.get(FLOW_RUN_ENV)}
    run = _open(name, config, {tag: value for tag, value in links.items() if value})
    status = "FINISHED"
    try:
        yield run
    except Exception:
        status = "FAILED"
        raise
    except BaseException:  # KeyboardInterrupt; SystemExit on SIGTERM
        status = "KILLED"
        raise
    finally:
        run.finish(status)


def _open(name: str, config: Config, tags: Mapping[str, str]) -> Run:
    if int(os.environ.get("RANK", "0")) != 0:
        return Run()
    try:
        uri = prepare_store()
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        experiment_id = experiment_id_of(client, uri)
        known = {"stage": name, "profile": config.profile, PROCESS_TAG: identity(), "mlflow.source.name": f"cm3leon {name}"}
        origin = {"dvc_lock_md5": lineage.dvc_lock_md5(), "git_commit": lineage.git_commit()}
        if commit := origin["git_commit"]:
            origin["mlflow.source.git.commit"] = commit.removesuffix("-dirty")  # MLflow's own column
        known |= {tag: value for tag, value in origin.items() if value}
        created = client.create_run(experiment_id, run_name=name, tags={**known, **tags})
    except StoreError as error:
        warn(f"{error}: {name} is not tracked")
        return Run()
    except Exception as error:  # SQLAlchemy's, requests' and MLflow's own errors
        warn(f"MLflow is not reachable at {without_password(tracking_uri())} ({_first_line(error)}): {name} is not tracked")
        return Run()
    run = Run(client, created.info.run_id, experiment_id)
    run.log_params(stage_params(name, config))
    return run


@contextmanager
def stage_run(stage: str, config: Config) -> Iterator[Run]:
    """Record a stage in a run named after it, child of the pipeline's run if there is one.

    Writes ``paths.run_file(stage)``, so that a stage restored from a cache still points to the run that made it. An exception ends the
    run as FAILED and is raised again. Ranks other than 0 record nothing.
    """
    with recorded_run(stage, config) as run:
        if int(os.environ.get("RANK", "0")) == 0:
            file = paths.run_file(stage)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"run_id": run.run_id, "experiment_id": run.experiment_id}) + "\n")
        yield run


@contextmanager
def pipeline_run(config: Config) -> Iterator[Run]:
    """The parent run of a pipeline: until it ends, the runs of stages started by this process are its children."""
    with recorded_run("pipeline", config) as run:
        before = os.environ.get(PARENT_RUN_ENV)
        if run.run_id:
            os.environ[PARENT_RUN_ENV] = run.run_id
        try:
            yield run
        finally:
            if before is None:
                os.environ.pop(PARENT_RUN_ENV, None)
            else:
                os.environ[PARENT_RUN_ENV] = before
