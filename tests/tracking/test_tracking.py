"""Runs are recorded completely if the stage fails, the process dies or the store stops answering."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.tracking import lineage, runs, store


def client():
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store.tracking_uri())


def test_the_uri_is_that_of_the_environment_or_an_absolute_sqlite_path(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert store.tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert store.tracking_uri() == "http://127.0.0.1:5000"


def test_preparing_a_current_store_is_fast_and_changes_nothing(project):
    store.prepare_store()
    revision = store.schema_revision(project / "mlflow.db")
    start = time.monotonic()
    store.prepare_store()
    assert time.monotonic() - start < 2
    assert revision
    assert store.schema_revision(project / "mlflow.db") == revision
    experiment = client().get_experiment_by_name("cm3leon")
    assert experiment.artifact_location == (project / "mlruns").as_uri()


def test_a_missing_or_empty_file_has_no_schema_revision(tmp_path):
    assert store.schema_revision(tmp_path / "none.db") is None
    (tmp_path / "empty.db").touch()
    assert store.schema_revision(tmp_path / "empty.db") is None


def test_a_stage_run_records_parameters_metrics_files_and_datasets(project):
    Path("dvc.lock").write_text("stages:\n  ingest:\n    outs:\n    - path: data/raw\n      md5: 0123456789abcdef0123456789abcdef.dir\n")
    Image.new("RGB", (8, 8), "red").save(project / "sheet.png")
    with runs.stage_run("pretrain", Config(profile="tiny", seed=3)) as run:
        for step in range(120):
            run.log_metrics({"pretrain/loss": 1 / (step + 1)}, step)
        run.log_metrics({"pretrain/tokens_per_second": 10.0})
        run.log_params({"extra": {"list": [1, 2]}})
        run.log_artifact("sheet.png", "sheets")
        run.log_image("sheet.png", "sheet", 7)
        run.log_dataset("data/raw", "raw")
        run.log_dataset("data/other", "other")
    found = client().get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "pretrain"
    tags = found.data.tags
    assert tags["stage"] == "pretrain"
    assert tags["profile"] == "tiny"
    assert tags["dvc_lock_md5"] == hashlib.md5(Path("dvc.lock").read_bytes()).hexdigest()
    assert found.data.params["pretrain.model.layers"] == "6"
    assert found.data.params["seed"] == "3"
    assert found.data.params["extra.list"] == "[1, 2]"
    assert not any(name.startswith("sft") for name in found.data.params)
    history = client().get_metric_history(run.run_id, "pretrain/loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [(s, 1 / (s + 1)) for s in range(120)]
    assert [f.path for f in client().list_artifacts(run.run_id, "sheets")] == ["sheets/sheet.png"]
    images = [f.path.split("+") for f in client().list_artifacts(run.run_id, "images")]
    assert [parts[:3] for parts in images] == [["images/sheet", "step", "7"]] * 2
    assert tags["mlflow.loggedImages"] == "True"
    digests = {i.dataset.name: i.dataset.digest for i in found.inputs.dataset_inputs}
    assert digests == {"raw": "0123456789abcdef0123456789abcdef.dir", "other": "untracked"}
    assert json.loads(paths.run_file("pretrain").read_text()) == {"run_id": run.run_id, "experiment_id": run.experiment_id}


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")])
def test_an_exception_ends_the_run_and_is_raised_again(project, error, status):
    def stage():
        with runs.stage_run("sft", Config()) as run:
            run.log_metrics({"sft/loss": 2.0}, 1)
            raise error(run.run_id)

    with pytest.raises(error) as caught:
        stage()
    found = client().get_run(caught.value.args[0])
    assert found.info.status == status
    assert found.data.metrics == {"sft/loss": 2.0}


def test_stages_are_children_of_the_pipeline(project, monkeypatch):
    monkeypatch.setenv(runs.FLOW_RUN_ENV, "flow-1")
    with runs.pipeline_run(Config()) as parent, runs.stage_run("ingest", Config()) as child:
        pass
    assert runs.PARENT_RUN_ENV not in os.environ
    tags = client().get_run(child.run_id).data.tags
    assert tags["mlflow.parentRunId"] == parent.run_id
    assert tags["prefect.flow_run_id"] == "flow-1"
    assert "mlflow.parentRunId" not in client().get_run(parent.run_id).data.tags


@pytest.mark.slow
def test_the_run_of_a_killed_process_is_ended_and_that_of_a_living_one_is_not(project):
    program = (
        "import os, signal\nfrom cm3leon.tracking import runs\nfrom cm3leon.config.schema import Config\n"
        "with runs.stage_run('pretrain', Config()) as run:\n"
        "    print(run.run_id, flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = str(Path(runs.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    killed = done.stdout.split()[-1]
    assert done.returncode == -9
    assert client().get_run(killed).info.status == "RUNNING"
    with runs.stage_run("sft", Config()) as living:
        store.prepare_store()
        assert client().get_run(living.run_id).info.status == "RUNNING"
    assert client().get_run(killed).info.status == "KILLED"


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////proc/nowhere/mlflow.db"])
def test_without_a_reachable_store_a_stage_still_runs(tmp_path, monkeypatch, capsys, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with runs.stage_run("tokenize", Config()) as run:
        run.log_metrics({"a": 1.0})
        run.log_params({"b": 1})
        run.log_dataset("data/raw", "raw")
        run.log_artifact(__file__)
        run.log_image("absent.png", "sheet", 1)
    assert time.monotonic() - start < 30
    assert run.run_id is None
    assert json.loads(paths.run_file("tokenize").read_text())["run_id"] is None
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert uri in warnings[0]


def test_a_store_that_stops_answering_is_one_warning_and_metrics_are_sent_later(project, capsys, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    original = MlflowClient.log_batch

    def refuse(*arguments, **keywords):
        raise MlflowException("not reachable")

    with runs.stage_run("sft", Config()) as run:
        monkeypatch.setattr(MlflowClient, "log_batch", refuse)
        for step in range(150):
            run.log_metrics({"sft/loss": 1.0}, step)
        monkeypatch.setattr(MlflowClient, "log_batch", original)
    assert capsys.readouterr().err.count("WARNING") == 1
    assert len(client().get_metric_history(run.run_id, "sft/loss")) == 150


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_set_during_a_run_changes_neither_order_nor_duration(project, monkeypatch, hours):
    now = time.time
    with runs.stage_run("sft", Config()) as run:
        for step in range(4):
            if step == 2:
                monkeypatch.setattr(time, "time", lambda: now() + 3600 * hours)
            run.log_metrics({"sft/loss": 1.0 - step / 10}, step)
    history = client().get_metric_history(run.run_id, "sft/loss")
    assert [metric.step for metric in sorted(history, key=lambda metric: (metric.timestamp, metric.step))] == [0, 1, 2, 3]
    found = client().get_run(run.run_id)
    assert found.data.metrics["sft/loss"] == 0.7
    assert 0 <= found.info.end_time - found.info.start_time < 60_000


def test_only_rank_zero_records(project, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with runs.stage_run("pretrain", Config()) as run:
        run.log_metrics({"a": 1.0})
    assert run.run_id is None
    assert not paths.run_file("pretrain").exists()


def test_the_git_commit_is_dirty_after_changes_other_than_of_the_lock(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert lineage.git_commit(tmp_path) is None
    git("init")
    for name in ("code.py", "dvc.lock"):
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    commit = lineage.git_commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "dvc.lock").write_text("2")
    assert lineage.git_commit(tmp_path) == commit
    (tmp_path / "code.py").write_text("2")
    assert lineage.git_commit(tmp_path) == f"{commit}-dirty"
