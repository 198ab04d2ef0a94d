"""A real MLflow server that goes away in the middle of a run, and comes back."""

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from cm3leon.config.schema import Config
from cm3leon.services.local import free_port
from cm3leon.tracking import runs
from cm3leon.tracking.sqlite import sqlite_uri
from cm3leon.utils.processes import stop_tree

pytestmark = pytest.mark.slow


class Server:
    """``python -m cm3leon.services.mlflow_server`` over the project's store."""

    def __init__(self, port):
        self.address, self.log = f"http://127.0.0.1:{port}", Path("server.log").absolute()
        root = Path("mlruns").absolute().as_uri()
        self.command = [sys.executable, "-m", "cm3leon.services.mlflow_server", root, str(port)]
        self.environment = {**os.environ, "MLFLOW_TRACKING_URI": sqlite_uri(Path("mlflow.db"))}

    def start(self):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=log)
        end = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=2).close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
                time.sleep(0.2)

    def stop(self):
        stop_tree(self.process.pid, 10)
        self.process.wait(20)


@pytest.fixture
def server(project, monkeypatch):
    server = Server(free_port(25000))
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    yield server
    server.stop()


def history(address, run_id, name):
    from mlflow import MlflowClient

    return [(metric.step, metric.value) for metric in MlflowClient(tracking_uri=address).get_metric_history(run_id, name)]


def test_a_run_goes_on_without_its_server_and_every_metric_arrives_in_order(server, capsys, monkeypatch):
    monkeypatch.setattr(runs, "RETRY_SECONDS", 5.0)
    slowest = 0.0
    with runs.stage_run("pretrain", Config()) as run:
        for step in range(300):
            if step == 50:
                server.stop()
            if step == 200:
                server.start()
            start = time.monotonic()
            run.log_metrics({"pretrain/loss": 1 / (step + 1)}, step)
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(0.1)
            if step in (60, 150):
                assert len(history_of_file(run.run_id)) <= 50
    assert history(server.address, run.run_id, "pretrain/loss") == [(step, 1 / (step + 1)) for step in range(300)]
    assert slowest < 15
    assert capsys.readouterr().err.count("WARNING") == 1


def test_files_that_cannot_be_sent_do_not_hold_up_the_run_and_are_counted(server, capsys):
    with runs.stage_run("pretrain", Config()) as run:
        server.stop()
        start = time.monotonic()
        run.log_artifact(__file__)
        one = time.monotonic() - start
        for _ in range(1, 10):
            run.log_artifact(__file__)
        assert time.monotonic() - start < one + 1
        server.start()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert len(warnings) == 2 and "the stage continues" in warnings[0]
    assert "10 files, parameters or states" in warnings[1]


def history_of_file(run_id):
    """What the store has, read without the server."""
    return history(sqlite_uri(Path("mlflow.db")), run_id, "pretrain/loss")
