"""A real server before real, untrained models says which version it serves, and changes it at a promotion while it is asked."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving_support import RED_PNG, Connection

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.registry import registry
from cm3leon.registry.bundle import build_bundle
from cm3leon.tracking import store

pytestmark = pytest.mark.slow


def promoted(composition):
    """Register a model with this score and make it the champion; the version's number."""
    from mlflow import MlflowClient

    file = paths.EVALUATION / "record.json"
    record = json.loads(file.read_text())
    record["scores"]["composition"] = composition
    file.unlink()
    file.write_text(json.dumps(record))
    number = registry.register(build_bundle(Path("bundle"), Config()), Config()).number
    uri = store.tracking_uri()
    MlflowClient(tracking_uri=uri, registry_uri=uri).set_registered_model_alias(registry.MODEL_NAME, registry.CHAMPION, number)
    return number


@pytest.fixture
def champion(project, tiny_models):
    for name in ("models", "data"):
        shutil.copytree(tiny_models / name, project / name)
    return promoted(0.5)


@pytest.fixture
def server(champion):
    """``cm3leon serve``, which looks at the alias five times a second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "cm3leon", "serve", "--port", str(port), "--follow", "0.2"]
    environment = os.environ | {"PYTHONPATH": str(Path(registry.__file__).parents[2])}
    with Path("serve.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    connection = Connection(f"http://127.0.0.1:{port}")
    try:
        connection.until(lambda: process.poll() is not None or connection.healthy(), seconds=90)
        assert process.poll() is None, Path("serve.log").read_text()
        yield connection
    finally:
        connection.client.close()
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def version_told(server):
    """The version in the health report, which those in the list of models and in the metrics must equal."""
    version = server.client.get("/health").json()["version"]
    [model] = server.client.get("/v1/models").json()["data"]
    [family] = [f for f in text_string_to_metric_families(server.client.get("/metrics").text) if f.name == "cm3leon_model_info"]
    assert [model["version"]] == [sample.labels["version"] for sample in family.samples] == [version]
    return version


def test_a_promotion_changes_the_served_version_and_no_request_is_dropped(server, champion):
    assert version_told(server) == champion == "1"
    statuses, done = [], threading.Event()

    def ask():
        body = {"image": RED_PNG}
        with Connection(server.url).client as client:
            while not done.is_set():
                statuses.append(client.post("/v1/tasks/caption", json=body).status_code)

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    try:
        server.until(lambda: len(statuses) > 10, seconds=60)
        second = promoted(0.6)
        server.until(lambda: server.client.get("/health").json()["version"] == second, seconds=60)
        before = len(statuses)
        server.until(lambda: len(statuses) > before + 10, seconds=60)
    finally:
        done.set()
        for asker in askers:
            asker.join(30)
    assert set(statuses) == {200}
    assert version_told(server) == second == "2"
    assert [line for line in Path("serve.log").read_text().splitlines() if line.startswith("serving ")] == [
        "serving cm3leon@champion, version 1",
        "serving cm3leon@champion, version 2",
    ]


def test_a_registry_that_cannot_be_read_is_one_warning_and_the_version_is_served_on(server, champion):
    whole = Path("mlflow.db").read_bytes()
    Path("mlflow.db").write_bytes(b"no database" * 1000)
    log = Path("serve.log")
    server.until(lambda: "warning: models:/cm3leon@champion: version 1 is served on, because" in log.read_text(), seconds=30)
    assert server.client.post("/v1/tasks/caption", json={"image": RED_PNG}).status_code == 200
    assert version_told(server) == "1"
    Path("mlflow.db").write_bytes(whole)
    second = promoted(0.6)
    server.until(lambda: server.client.get("/health").json()["version"] == second, seconds=60)
    assert log.read_text().count("warning:") == 1
