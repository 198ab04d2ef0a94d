"""Both servers of ``cm3leon up`` on a real PostgreSQL, with two workers."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cm3leon.services.local import free_port
from cm3leon.utils.processes import pid_of, stop_tree

ROOT = Path(__file__).parents[2]
BINARIES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
RUNS = 6
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BINARIES is None, reason="PostgreSQL is not installed")]
TOY = """
import time
from prefect import flow

@flow
def toy() -> None:
    import mlflow
    with mlflow.start_run(experiment_id=mlflow.set_experiment("toy").experiment_id):
        for step in range(20):
            mlflow.log_metric("loss", 1 / (step + 1), step)
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[tuple[int, Path]]:
    """A server with the databases ``mlflow`` and ``prefect``; yields its port and its log."""
    assert BINARIES
    port, as_user = free_port(25432), []
    with tempfile.TemporaryDirectory(prefix="cm3leon-postgres-") as name:
        folder = Path(name)
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            shutil.chown(folder, "postgres")
            as_user = ["runuser", "-u", "postgres", "--"]

        def run(program: str, *arguments: str) -> None:
            subprocess.run([*as_user, str(BINARIES / program), *arguments], check=True, cwd="/", stdout=subprocess.DEVNULL)

        data = folder / "data"
        run("initdb", "--pgdata", str(data), "--username", "cm3leon", "--auth", "trust", "--no-sync")
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
        run("pg_ctl", "--pgdata", str(data), "--log", str(folder / "log"), "--options", options, "--wait", "start")
        try:
            for database in ("mlflow", "prefect"):
                run("createdb", "--host", "127.0.0.1", "--port", str(port), "--username", "cm3leon", database)
            yield port, folder / "log"
        finally:
            run("pg_ctl", "--pgdata", str(data), "--mode", "immediate", "stop")


def test_two_workers_on_postgresql(postgres: tuple[int, Path], tmp_path: Path) -> None:
    port, log = postgres
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    shutil.copytree(ROOT / ".dvc", tmp_path / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    for name in ("dvc.yaml", "params.yaml", "prefect.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "prefect.yaml").write_text("deployments:\n- {name: toy, entrypoint: toy.py:toy, work_pool: {name: local}}\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_", "CM3LEON_"))}
    environment = {
        **kept,
        "PYTHONPATH": str(ROOT),
        "CM3LEON_MLFLOW_DATABASE_URL": f"postgresql+psycopg2://cm3leon@127.0.0.1:{port}/mlflow",
        "CM3LEON_PREFECT_DATABASE_URL": f"postgresql+asyncpg://cm3leon@127.0.0.1:{port}/prefect",
    }

    def cm3leon(*arguments: str) -> None:
        command = [sys.executable, "-m", "cm3leon", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    cm3leon("up", "--mlflow-port", str(free_port(16400)), "--prefect-port", str(free_port(16600)))
    try:
        _run_toys(tmp_path, environment)
        assert not (tmp_path / "mlflow.db").exists()
        supervisor = psutil.Process(pid_of(json.loads((tmp_path / ".services/state.json").read_text())["supervisor"]))
        lines = [" ".join(process.cmdline()) for process in (supervisor, *supervisor.children(recursive=True))]
        assert any("mlflow_server" in line for line in lines) and not any("postgresql+" in line for line in lines)
        for file in [log, *(tmp_path / ".services/logs").iterdir()]:
            assert not re.search(r"deadlock|database is locked|Traceback|ERROR|FATAL", file.read_text()), file.read_text()[-3000:]
    finally:
        cm3leon("down")


def _run_toys(root: Path, environment: dict[str, str]) -> None:
    """Six runs at once on two workers; all end well, and record all metrics."""
    from cm3leon.services import stack

    state = stack.State(**json.loads((root / stack.STATE).read_text()))
    known = json.loads((root / stack.SECRETS).read_text())["password"]
    token = base64.b64encode(f"cm3leon:{known}".encode()).decode()

    def ask(address: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {token}"}
        with urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode(), headers), timeout=30) as answer:
            return json.load(answer)

    clients = {
        "PREFECT_API_URL": f"{state.prefect}/api", "PREFECT_API_AUTH_STRING": f"cm3leon:{known}", "PREFECT_HOME": str(root / ".prefect"),
        "MLFLOW_TRACKING_URI": state.mlflow, "MLFLOW_TRACKING_USERNAME": "cm3leon", "MLFLOW_TRACKING_PASSWORD": known,
    }  # fmt: skip
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "local", "--name", "second"]
    with (root / "second.log").open("wb") as log:
        second = subprocess.Popen(command, cwd=root, env={**environment, **clients}, stdout=log, stderr=subprocess.STDOUT)
    try:
        ask(f"{state.mlflow}/api/2.0/mlflow/experiments/create", {"name": "toy"})  # two runs at once would, which the log calls an error
        [deployment] = ask(f"{state.prefect}/api/deployments/filter", {})
        ids = [ask(f"{state.prefect}/api/deployments/{deployment['id']}/create_flow_run", {})["id"] for _ in range(RUNS)]
        end = time.monotonic() + 120
        while True:
            runs = ask(f"{state.prefect}/api/flow_runs/filter", {"flow_runs": {"id": {"any_": ids}}})
            states = [run["state_name"] for run in runs]
            if set(states) == {"Completed"}:
                break
            assert not {"Failed", "Crashed"} & set(states), states
            assert time.monotonic() < end, states
            time.sleep(1)
        experiments = ask(f"{state.mlflow}/api/2.0/mlflow/experiments/search", {"max_results": 10})["experiments"]
        [toy] = [found["experiment_id"] for found in experiments if found["name"] == "toy"]
        recorded = ask(f"{state.mlflow}/api/2.0/mlflow/runs/search", {"experiment_ids": [toy]})["runs"]
        assert [run["data"]["metrics"][0]["step"] for run in recorded] == [19] * RUNS
    finally:
        assert psutil.pid_exists(second.pid)
        stop_tree(second.pid, 10)
        second.wait()
