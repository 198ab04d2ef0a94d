"""``cm3leon ui``: MLflow, Prefect and the Data Docs on 127.0.0.1, until Ctrl-C.

While it is up, runs started in this project use its Prefect server (``.prefect/server.json`` names it).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from flows.child import stop_tree
from flows.environment import PREFECT_HOME, SERVER_FILE, use_environment

HOST = "127.0.0.1"
DATA_DOCS = Path("data/validated/data_docs")
LOGS = Path(".cache/ui")
START_SECONDS = 90.0


def free_port(wanted: int) -> int:
    """``wanted``, or the next port of 127.0.0.1 that nothing listens on.

    Raises:
        OSError: if the next hundred are taken too.
    """
    for port in range(wanted, wanted + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port from {wanted} to {wanted + 99}")


def commands(mlflow_port: int, prefect_port: int, docs_port: int) -> dict[str, tuple[list[str], str, str]]:
    """Name -> (command, address to show, address that answers once it is up)."""
    from cm3leon import tracking

    uri = tracking.tracking_uri()
    found: dict[str, tuple[list[str], str, str]] = {}
    if uri.startswith("http"):
        found["MLflow"] = ([], uri, uri)
    else:
        port, artefacts = free_port(mlflow_port), Path("mlruns").absolute().as_uri()
        command = ["mlflow", "server", "--backend-store-uri", uri, "--default-artifact-root", artefacts]
        found["MLflow"] = ([*command, "--host", HOST, "--port", str(port), "--workers", "1"], f"http://{HOST}:{port}", "/health")
    if url := os.environ.get("PREFECT_API_URL"):
        found["Prefect"] = ([], url.removesuffix("/api"), "")
    else:
        port = free_port(prefect_port)
        found["Prefect"] = (["prefect", "server", "start", "--host", HOST, "--port", str(port)], f"http://{HOST}:{port}", "/api/health")
    if (DATA_DOCS / "index.html").is_file():
        port = free_port(docs_port)
        docs = ["http.server", str(port), "--bind", HOST, "--directory", str(DATA_DOCS)]
        found["Data Docs"] = (docs, f"http://{HOST}:{port}", "/")
    return found


def serve(mlflow_port: int = 5000, prefect_port: int = 4200, docs_port: int = 8000) -> None:
    """Start what is not up yet, print the addresses, stop all on Ctrl-C or SIGTERM."""
    from cm3leon.tracking import prepare_store

    use_environment()
    prepare_store()
    services = commands(mlflow_port, prefect_port, docs_port)
    with _running(services):
        for name, (_, address, _) in services.items():
            print(f"{name:<10} {address}", flush=True)
        if "Data Docs" not in services:
            print(f"Data Docs  none yet: {DATA_DOCS} is made by the stage validate", flush=True)
        print(f"Ctrl-C stops them; their logs are in {LOGS}/", flush=True)
        while True:
            time.sleep(1)


def _leave(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _running(services: dict[str, tuple[list[str], str, str]]) -> Iterator[None]:
    """The services that have a command, up; stopped at the end, however it comes.

    Raises:
        RuntimeError: if one ends, or does not answer in time.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _leave)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, (command, _, _) in services.items():
            if command:
                with (LOGS / f"{name.lower().replace(' ', '-')}.log").open("wb") as log:
                    processes[name] = subprocess.Popen(
                        [sys.executable, "-m", *command], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
                    )
        for name, process in processes.items():
            _wait(name, process, services[name][1] + services[name][2])
        if "Prefect" in processes:
            PREFECT_HOME.mkdir(exist_ok=True)
            SERVER_FILE.write_text(json.dumps({"api_url": f"{services['Prefect'][1]}/api"}) + "\n")
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if "Prefect" in processes:
            SERVER_FILE.unlink(missing_ok=True)
        for process in processes.values():
            stop_tree(process.pid, seconds=10)


def _wait(name: str, process: subprocess.Popen[bytes], url: str) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended with status {process.returncode}; see {LOGS}/")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"{name} does not answer at {url} after {START_SECONDS:.0f} s; see {LOGS}/")
