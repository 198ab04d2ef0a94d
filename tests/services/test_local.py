"""``cm3leon ui``: it starts behind a dead proxy, says where its servers are, and leaves none of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cm3leon.services.environment import SERVER_FILE, ui_servers
from cm3leon.services.leftovers import OWNED, PROCESSES, end_leftover_processes
from cm3leon.services.local import free_port
from cm3leon.utils.processes import has_ended, pid_of, stop_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
DEAD = {"HTTP_PROXY": "http://127.0.0.2:9", "HTTPS_PROXY": "http://127.0.0.2:9", "ALL_PROXY": "socks5://127.0.0.2:9"}


@pytest.fixture(autouse=True)
def with_prefect_database(project: Path, prepared_prefect: Path) -> None:
    (project / ".prefect").mkdir()
    shutil.copyfile(prepared_prefect, project / ".prefect/prefect.db")


@contextmanager
def running_ui(project: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command, once it has announced its servers."""
    ports = [f"--{name}-port={free_port(0)}" for name in ("mlflow", "prefect", "docs")]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_") and name.lower() != "no_proxy"}
    command = [sys.executable, "-m", "cm3leon", "ui", *ports]
    with (project / "ui.log").open("wb") as log, subprocess.Popen(command, cwd=project, env=ours | DEAD, stdout=log, stderr=log) as process:
        try:
            end = time.monotonic() + 90
            while not (project / SERVER_FILE).is_file():
                assert process.poll() is None and time.monotonic() < end, (project / "ui.log").read_text()
                time.sleep(0.1)
            yield process
        finally:
            stop_tree(process.pid, 10)


def servers_of(project: Path) -> list[str]:
    return [record.name for record in (project / OWNED / PROCESSES).glob("*")]


def test_ui_starts_behind_a_dead_proxy_and_ctrl_c_ends_its_servers(project: Path) -> None:
    with running_ui(project) as process:
        found = json.loads((project / SERVER_FILE).read_text())["servers"]
        assert list(found) == ["MLflow", "Prefect"]
        assert ui_servers() == found
        for address in found.values():
            assert urllib.request.urlopen(address, timeout=10).status == 200
        with urllib.request.urlopen(f"{found['Prefect']}/ui-settings", timeout=10) as answer:
            assert json.load(answer)["api_url"] == f"{found['Prefect']}/api"
        servers = servers_of(project)
        process.send_signal(signal.SIGINT)
        assert process.wait(45) == 0
    assert len(servers) == 2 and all(has_ended(name) for name in servers)
    assert ui_servers() == {} and servers_of(project) == []


def test_servers_of_a_killed_ui_are_ended_by_the_next_command_that_needs_one(project: Path) -> None:
    with running_ui(project) as process:
        process.kill()
        process.wait()
    servers = servers_of(project)
    assert len(servers) == 2 and not any(has_ended(name) for name in servers)
    assert ui_servers() == {}  # its file is still there
    assert sorted(end_leftover_processes()) == sorted(pid_of(name) for name in servers)
    assert all(has_ended(name) for name in servers)
