"""A worker ends when it is told to, also while a run is at work and its server hangs."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from cm3leon.services.local import free_port
from cm3leon.utils.processes import STOP_SECONDS, stop_tree

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
FLOW = """
import time
from prefect import flow

@flow
def sleep():
    time.sleep(300)
"""
ASK = """
from prefect import flow
from prefect.deployments import run_deployment
found = flow.from_source(source=".", entrypoint="work.py:sleep")
found.deploy(name="now", work_pool_name="pool", print_next_steps=False)
run_deployment("sleep/now", timeout=0)
"""


@pytest.fixture
def environment(tmp_path, monkeypatch, prepared_prefect):
    """Variables of processes that use a Prefect server of their own, which they can start."""
    monkeypatch.chdir(tmp_path)
    Path("prefect").mkdir()
    shutil.copyfile(prepared_prefect, "prefect/prefect.db")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    api = f"http://127.0.0.1:{free_port(26000)}/api"
    return {**kept, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": api, "DO_NOT_TRACK": "1"}


@pytest.fixture
def server(environment):
    """The process of the server, once it answers."""
    port = environment["PREFECT_API_URL"].rpartition(":")[2].removesuffix("/api")
    command = [sys.executable, "-m", "prefect", "server", "start", "--no-ui", "--host", "127.0.0.1", "--port", port]
    with Path("server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/api/health"))
        yield psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGCONT)
        stop_tree(process.pid, 5)
        process.wait()


def answers(url):
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except OSError:
        return False
    return True


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_worker_ends_while_a_run_is_at_work_and_the_server_hangs(environment, server):
    Path("work.py").write_text(FLOW)
    for arguments in (["-m", "prefect", "work-pool", "create", "pool", "--type", "process"], ["-c", ASK]):
        subprocess.run([sys.executable, *arguments], env=environment, check=True, capture_output=True)
    with Path("worker.log").open("wb") as log:
        worker = subprocess.Popen([sys.executable, "-m", "cm3leon.services.worker", "pool"], env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: "Beginning flow run" in Path("worker.log").read_text())
        processes = psutil.Process(worker.pid).children(recursive=True)
        assert len(processes) >= 2
        server.suspend()
        time.sleep(10)
        start = time.monotonic()
        worker.terminate()
        assert worker.wait(STOP_SECONDS + 15) == 0
        assert time.monotonic() - start < STOP_SECONDS + 15
        _, alive = psutil.wait_procs(processes, timeout=5)
        assert not alive
    finally:
        stop_tree(worker.pid, 0)
