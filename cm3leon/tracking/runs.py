"""MLflow runs of stages and pipelines: parameters, metrics, artifacts, lineage.

    with tracking.stage_run("pretrain", config) as run:
        run.log_metrics({"pretrain/loss": 1.2}, step=100)

A stage never fails because of tracking: without a reachable store it gets one warning and a run that records nothing, and a store
that goes away under way is warned about once and tried again later. Without ``MLFLOW_TRACKING_URI`` the store is ``./mlflow.db``.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.tracking import lineage
from cm3leon.tracking.store import PROCESS_TAG, experiment_id_of, own_process, prepare_store, tracking_uri, warn

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT_RUN_ENV = "CM3LEON_PARENT_RUN_ID"
FLOW_RUN_ENV = "CM3LEON_FLOW_RUN_ID"

BATCH_METRICS, BATCH_SECONDS, RETRY_SECONDS = 50, 5.0, 60.0
MAX_PENDING = 100_000
"""Metrics kept while the store is away; older ones are dropped, and the final warning counts them."""


class Run:
    """A run being recorded. Without a client it does nothing, so that stages need not ask."""

    def __init__(self, client: MlflowClient | None = None, run_id: str | None = None, experiment_id: str | None = None) -> None:
        self.client, self.run_id, self.experiment_id = client, run_id, experiment_id
        self._metrics: list[Any] = []
        self._sent = time.monotonic()
        self._away_since: float | None = None
        self._lost = 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record figures; they are buffered and sent together. Values that are not finite are sent as they are."""
        if self.client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._metrics += [Metric(name, float(value), now, step or 0) for name, value in metrics.items()]
        if len(self._metrics) >= BATCH_METRICS or time.monotonic() - self._sent >= BATCH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send the buffered metrics. While the store is away they are kept, and tried again once a minute."""
        if self._away_since is not None and time.monotonic() - self._away_since < RETRY_SECONDS:
            return
        while self._metrics and self.client is not None:
            batch = self._metrics[:1000]
            if not self._try("log_batch", metrics=batch):
                self._lost += max(0, len(self._metrics) - MAX_PENDING)
                self._metrics = self._metrics[-MAX_PENDING:]
                break
            self._metrics = self._metrics[1000:]
        self._sent = time.monotonic()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters, nested ones under dotted names. MLflow's parameters cannot be changed later."""
        if self.client is None:
            return
        from mlflow.entities import Param

        rows = [Param(name, value[:6000]) for name, value in flatten(params).items()]
        for start in range(0, len(rows), 100):
            self._try("log_batch", params=rows[start : start + 100])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        for name, value in tags.items():
            self._try("set_tag", name, value)

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Keep a file, or a directory with all it holds, under the run's artifacts."""
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist, so it cannot be logged to MLflow")
        if path.is_dir():
            self._try("log_artifacts", str(path), folder or path.name)
        else:
            self._try("log_artifact", str(path), folder or None)

    def log_figure_file(self, path: str | Path, name: str, step: int) -> None:
        """Keep an image, a sheet of samples say, as ``samples/NAME_STEP.suffix``."""
        if self.client is None:
            return
        path = Path(path)
        with tempfile.TemporaryDirectory() as folder:
            named = Path(folder) / f"{name}_{step:07d}{path.suffix}"
            shutil.copyfile(path, named)
            self.log_artifact(named, "samples")

    def log_dataset(self, path: str | Path, name: str) -> None:
        """Record a dataset the run reads. Its digest is DVC's md5 of the path, or "untracked" where ``dvc.lock`` has none."""
        if self.client is None:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        digest = lineage.dvc_md5(path) or "untracked"
        source = json.dumps({"uri": Path(path).absolute().as_uri()})
        dataset = Dataset(name=name, digest=digest[:36], source_type="local", source=source)
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "input")])]
        self._try("log_inputs", datasets=inputs)

    def finish(self, status: str) -> None:
        """Send what is buffered and end the run: FINISHED, FAILED or KILLED."""
        self._away_since = None
        self.flush()
        self._try("set_terminated", status)
        if lost := self._lost + len(self._metrics):
            warn(f"{lost} metrics of MLflow run {self.run_id} could not be sent")

    def _try(self, method: str, *arguments: Any, **keywords: Any) -> bool:
        """Whether the client's ``method``, called for this run, worked. The first failure is warned about; none stops the stage."""
        if self.client is None:
            return False
        from mlflow.exceptions import MlflowException

        try:
            getattr(self.client, method)(self.run_id, *arguments, **keywords)
        except (MlflowException, OSError) as error:
            if self._away_since is None:
                warn(f"MLflow did not take {method} of run {self.run_id} ({_first_line(error)}); going on")
            self._away_since = time.monotonic()
            return False
        self._away_since = None
        return True


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
    """What of the configuration a stage's run records: its own section and the seed; the whole of it for other names."""
    tree = config.model_dump(by_alias=True)
    wanted = {"evaluate": ["evaluate", "decoding"]}.get(stage, [stage])
    sections = {name: tree[name] for name in wanted if name in tree}
    return {**sections, "seed": config.seed} if sections else tree


@contextmanager
def recorded_run(name: str, config: Config) -> Iterator[Run]:
    """A run under the pipeline's run where there is one; ends FINISHED, FAILED on an exception, or KILLED if told to leave."""
    links = {"mlflow.parentRunId": os.environ.get(PARENT_RUN_ENV), "prefect.flow_run_id": os.environ.get(FLOW_RUN_ENV)}
    run = _open(name, config, {tag: value for tag, value in links.items() if value})
    status = "FINISHED"
    try:
        yield run
    except Exception:
        status = "FAILED"
        raise
    except BaseException:  # KeyboardInterrupt, SystemExit
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
        experiment_id = experiment_id_of(client, Path("."), uri)
        every = {"stage": name, "profile": config.profile, PROCESS_TAG: own_process(), "mlflow.source.name": f"cm3leon {name}"}
        for tag, value in (("dvc_lock_md5", lineage.dvc_lock_md5()), ("git_commit", lineage.git_commit())):
            every |= {tag: value} if value else {}
        made = client.create_run(experiment_id, run_name=name, tags={**every, **tags})
    except Exception as error:  # SQLAlchemy's, requests' and MLflow's own errors
        warn(f"MLflow is not reachable at {tracking_uri()} ({_first_line(error)}): {name} is not tracked")
        return Run()
    run = Run(client, made.info.run_id, experiment_id)
    run.log_params(stage_params(name, config))
    return run


@contextmanager
def stage_run(stage: str, config: Config) -> Iterator[Run]:
    """Record a stage in a run named after it, under the pipeline's run where there is one.

    Writes ``paths.run_file(stage)``, so that a stage restored from a cache still points to the run that made it. An exception ends the
    run as FAILED and goes on. On ranks other than 0 nothing is recorded.
    """
    with recorded_run(stage, config) as run:
        if int(os.environ.get("RANK", "0")) == 0:
            file = paths.run_file(stage)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"run_id": run.run_id, "experiment_id": run.experiment_id}) + "\n")
        yield run


@contextmanager
def pipeline_run(config: Config) -> Iterator[Run]:
    """The parent run of a pipeline: while it is open, stages started by this process record their runs under it."""
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
