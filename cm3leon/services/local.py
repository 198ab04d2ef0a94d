"""Local servers: MLflow, Prefect and the Data Docs on 127.0.0.1 until Ctrl-C (``cm3leon ui``), and a Prefect server for one run.

While ``cm3leon ui`` runs, runs of this project use its Prefect server; the addresses are in ``.prefect/server.json``.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import NamedTuple

from cm3leon.config import paths
from cm3leon.services.automations import mark_stuck_runs
from cm3leon.services.environment import PREFECT_HOME, SERVER_FILE, ui_servers, use_environment
from cm3leon.services.leftovers import PROCESSES, end_leftover_processes, owned
from cm3leon.tracking.view import TRAINING
from cm3leon.utils.errors import UserError
from cm3leon.utils.files import write_json
from cm3leon.utils.processes import identity, stop_tree

HOST = "127.0.0.1"
LOGS = Path(".cache/ui")
PREFECT_PAGES = "PREFECT_SERVER_UI_API_URL"
START_SECONDS = 90.0
"""How long a server may take to answer."""


class ServiceError(UserError):
    """A server ended, or did not answer in time."""


def answers(address: str) -> bool:
    """True if something answers; 401 is an answer too."""
    try:
        with urllib.request.urlopen(address, timeout=3):
            return True
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except OSError:
        return False


def free_port(wanted: int) -> int:
    """``wanted``, or the next port of 127.0.0.1 on which no process listens; with 0 one that the system chooses.

    Raises:
        ServiceError: if a hundred ports from ``wanted`` on are in use.
    """
    for port in range(wanted, wanted + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ServiceError(f"ports {wanted} to {wanted + 99} of {HOST} are all in use; name another port")


class Service(NamedTuple):
    """A server with pages for the browser.

    Attributes:
        server: its root address.
        page: path of the first page.
        health: path that answers once the server is up.
        command: arguments of ``python -m`` that start it; empty for a server that is already running.
        environment: variables in addition to this process's.
    """

    server: str
    page: str = ""
    health: str = "/"
    command: Sequence[str] = ()
    environment: Mapping[str, str] = MappingProxyType({})

    @property
    def address(self) -> str:
        """The address to open in a browser."""
        return self.server + self.page


def pages_environment(prefect: str) -> dict[str, str]:
    """Variables of the Prefect server at this address: where its pages find its API, which they expect at port 4200 by themselves."""
    return {PREFECT_PAGES: os.environ.get(PREFECT_PAGES) or f"{prefect}/api"}


def services(uri: str, experiment_id: str, mlflow_port: int, prefect_port: int, docs_port: int) -> dict[str, Service]:
    """The servers by name; those that are up already are not started.

    Args:
        uri: the MLflow store, or the address of an MLflow server. Data Docs are served once ``validate`` has written them.
    """
    runs = f"/#/experiments/{experiment_id}/runs?{TRAINING}"
    if uri.startswith("http"):
        mlflow = Service(uri.rstrip("/"), runs)
    else:
        port, artifacts = free_port(mlflow_port), Path("mlruns").absolute().as_uri()
        mlflow = Service(f"http://{HOST}:{port}", runs, "/health", ["cm3leon.services.mlflow_server", artifacts, str(port)])
    if url := os.environ.get("PREFECT_API_URL"):
        prefect = Service(url.removesuffix("/api"))
    else:
        port = free_port(prefect_port)
        address, command = f"http://{HOST}:{port}", ["prefect", "server", "start", "--host", HOST, "--port", str(port)]
        prefect = Service(address, "", "/api/health", command, pages_environment(address))
    by_name = {"MLflow": mlflow, "Prefect": prefect}
    if (paths.DATA_DOCS / "index.html").is_file():
        port = free_port(docs_port)
        by_name["Data Docs"] = Service(
            f"http://{HOST}:{port}", command=["http.server", str(port), "--bind", HOST, "--directory", str(paths.DATA_DOCS)]
        )
    return by_name


def serve(mlflow_port: int = 5000, prefect_port: int = 4200, docs_port: int = 8001) -> None:
    """Start the servers that are not running yet, print their addresses, stop them on Ctrl-C or SIGTERM."""
    from mlflow import MlflowClient

    from cm3leon.services.stack import running
    from cm3leon.tracking.store import experiment_id_of, prepare_store

    use_environment()
    end_leftover_processes()
    uri = prepare_store()
    experiment_id = experiment_id_of(MlflowClient(tracking_uri=uri, registry_uri=uri), uri)
    up = running()
    by_name = services(up.mlflow if up else uri, experiment_id, mlflow_port, prefect_port, docs_port)
    with suppress(KeyboardInterrupt), _running(by_name):
        if by_name["Prefect"].command:
            mark_stuck_runs({**os.environ, "PREFECT_API_URL": f"{by_name['Prefect'].server}/api"})
        for name, service in by_name.items():
            print(f"{name:<10} {service.address}", flush=True)
        if "Data Docs" not in by_name:
            print("Data Docs  none yet; they are written by: cm3leon validate", flush=True)
        print(f"Ctrl-C stops the servers; their logs are in {LOGS}/", flush=True)
        while True:
            time.sleep(1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _running(by_name: dict[str, Service]) -> Iterator[None]:
    """Start the servers that have a command and wait until they answer; stop them on leaving the block, also by an exception.

    Raises:
        ServiceError: if a server ends, or does not answer in time.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # a script's background process is started with SIGINT ignored
        signal.signal(number, _interrupt)
    started = {name: service for name, service in by_name.items() if service.command}
    with ExitStack() as stack:
        logs = {name: LOGS / f"{name.lower().replace(' ', '-')}.log" for name in started}
        for log in logs.values():
            log.unlink(missing_ok=True)
        processes = {
            name: stack.enter_context(_process(service.command, logs[name], service.environment)) for name, service in started.items()
        }
        for name, process in processes.items():
            _wait(name, process, started[name].server + started[name].health, logs[name])
        if not ui_servers():
            stack.enter_context(_announced({name: service.server for name, service in by_name.items()}))
        yield


@contextmanager
def temporary_prefect(home: Path = PREFECT_HOME) -> Iterator[str]:
    """A Prefect server without pages until the block ends; yields its API address. Its log is ``HOME/temporary-server.log``.

    It is in a session of its own, so that Ctrl-C in a terminal reaches only the run, which can then still report its end to the server.

    Raises:
        ServiceError: if the server ends, or does not answer in time.
    """
    port, log = free_port(0), home / "temporary-server.log"
    command = ["prefect", "server", "start", "--no-ui", "--host", HOST, "--port", str(port)]
    with _process(command, log, start_new_session=True) as process:
        _wait("Prefect", process, f"http://{HOST}:{port}/api/health", log)
        yield f"http://{HOST}:{port}/api"


@contextmanager
def _process(
    command: Sequence[str], log: Path, environment: Mapping[str, str] = MappingProxyType({}), start_new_session: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """``python -m COMMAND`` until the block ends, with its output appended to ``log``; the next run ends it if this process is killed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=start_new_session,
        )
    with owned(PROCESSES, identity(process.pid)):
        try:
            yield process
        finally:
            with _uninterrupted():  # a second Ctrl-C would leave the server running
                stop_tree(process.pid, seconds=10)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _announced(servers: dict[str, str]) -> Iterator[None]:
    """The addresses in :data:`SERVER_FILE` until the block ends."""
    SERVER_FILE.parent.mkdir(exist_ok=True)
    write_json(SERVER_FILE, {"process": identity(), "servers": servers})
    try:
        yield
    finally:
        SERVER_FILE.unlink(missing_ok=True)


def _wait(name: str, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ServiceError(f"the {name} server ended with status {process.returncode}; its log {log} says why")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise ServiceError(f"the {name} server does not answer at {url} after {START_SECONDS:.0f} s; its log {log} says why")
