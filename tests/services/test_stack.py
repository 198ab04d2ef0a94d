"""``cm3leon up``: the services of one host, behind a password; they survive the loss of any part, and leave nothing when stopped."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from cm3leon.services import stack
from cm3leon.services.automations import STUCK_RUNS
from cm3leon.services.environment import ServerError
from cm3leon.services.events import emit
from cm3leon.services.local import ServiceError, free_port

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, prepared_store: Path, prepared_prefect: Path) -> Path:
    """A project with a store, in which nothing has run."""
    root = tmp_path_factory.mktemp("stack")
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    shutil.copytree(ROOT / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    shutil.copytree(ROOT / "flows", root / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml", "prefect.yaml", "prefect.toml"):
        shutil.copy(ROOT / name, root)
    shutil.copy(prepared_store, root / "mlflow.db")
    (root / ".prefect").mkdir()
    shutil.copy(prepared_prefect, root / ".prefect/prefect.db")
    return root


def cm3leon(root: Path, *arguments: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_", "CM3LEON_"))}
    environment = {**kept, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cm3leon", *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def up(root: Path) -> Iterator[dict[str, str]]:
    """Running services; yields the addresses that the command printed."""
    printed = cm3leon(root, "up", "--mlflow-port", str(free_port(16000)), "--prefect-port", str(free_port(16200)))
    yield {line.split()[0]: line.split()[1] for line in printed.splitlines()}
    processes = [psutil.Process(supervisor(root)), *psutil.Process(supervisor(root)).children(recursive=True)]
    assert cm3leon(root, "down") == "stopped\n"
    assert not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert cm3leon(root, "down") == "nothing is up\n"


def supervisor(root: Path) -> int:
    return int(json.loads((root / ".services/state.json").read_text())["supervisor"].split(":")[1])


def password(root: Path) -> str:
    return str(json.loads((root / ".services/secrets.json").read_text())["password"])


def request_of(address: str, data: bytes | None, password: str | None) -> urllib.request.Request:
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    if password:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"cm3leon:{password}".encode()).decode())
    return request


def status(address: str, password: str | None, data: bytes | None = None) -> int:
    try:
        with urllib.request.urlopen(request_of(address, data, password), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def answer(address: str, data: bytes, password: str) -> bytes:
    with urllib.request.urlopen(request_of(address, data, password), timeout=10) as answered:
        return bytes(answered.read())


def until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.2)


def asked(up: dict[str, str]) -> dict[str, tuple[str, bytes | None]]:
    """Requests that need the password: address and body."""
    return {
        "mlflow": (f"{up['MLflow']}/api/2.0/mlflow/experiments/search?max_results=1", None),
        "prefect": (f"{up['Prefect']}/api/deployments/filter", b"{}"),
    }


def test_both_servers_refuse_who_has_no_password(root: Path, up: dict[str, str]) -> None:
    for address, data in asked(up).values():
        assert status(address, password(root), data) == 200
        assert status(address, None, data) == status(address, "wrong", data) == 401
    assert {stat.S_IMODE((root / ".services" / name).stat().st_mode) for name in ("secrets.json", "state.json")} == {0o600}
    for log in (root / ".services/logs").iterdir():
        assert password(root) not in log.read_text()
    listening = {c.laddr.ip for c in psutil.net_connections("inet") if c.status == "LISTEN" and c.pid in parts(root).values()}
    assert listening <= {"127.0.0.1"}


def parts(root: Path) -> dict[str, int]:
    """Part -> process id."""
    found: dict[str, int] = {}
    for child in psutil.Process(supervisor(root)).children():
        with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
            command = " ".join(child.cmdline())
            for name, part in (("mlflow", "mlflow_server"), ("prefect", "server start"), ("worker", "worker start")):
                if part in command:
                    found[name] = child.pid
    return found


def test_the_deployments_are_there_and_a_second_up_changes_nothing(root: Path, up: dict[str, str]) -> None:
    before = parts(root)
    assert set(before) == {"mlflow", "prefect", "worker"}
    again = cm3leon(root, "up")
    assert up["MLflow"] in again and up["Prefect"] in again
    assert parts(root) == before
    deployments = json.loads(answer(f"{up['Prefect']}/api/deployments/filter", b"{}", password(root)))
    assert {"nightly", "on-data-change"} <= {deployment["name"] for deployment in deployments}
    automations = json.loads(answer(f"{up['Prefect']}/api/automations/filter", b"{}", password(root)))
    assert [automation["enabled"] for automation in automations if automation["name"] == STUCK_RUNS["name"]] == [True]


def test_a_new_database_gets_the_deployments(root: Path, up: dict[str, str]) -> None:
    found = (f"{up['Prefect']}/api/deployments/filter", b"{}", password(root))
    before = {deployment["name"]: deployment["id"] for deployment in json.loads(answer(*found))}
    for name in before.values():
        request = request_of(f"{up['Prefect']}/api/deployments/{name}", None, password(root))
        request.method = "DELETE"
        urllib.request.urlopen(request, timeout=10).close()
    cm3leon(root, "up")
    assert {deployment["name"] for deployment in json.loads(answer(*found))} == set(before)


def test_an_event_needs_the_password(root: Path, up: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"{up['Prefect']}/api")
    resource = {"prefect.resource.id": "cm3leon.test"}
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "cm3leon:wrong")
    with pytest.raises(ServerError, match=r"it answers HTTP Error 401: .*; set PREFECT_API_AUTH_STRING to user:password"):
        emit("cm3leon.test", resource, {})
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", f"cm3leon:{password(root)}")
    emit("cm3leon.test", resource, {})
    found = (f"{up['Prefect']}/api/events/count-by/event", b'{"filter": {"event": {"name": ["cm3leon.test"]}}}')
    until(lambda: b"cm3leon.test" in answer(*found, password(root)), 15)


@pytest.mark.parametrize("part", ["mlflow", "prefect", "worker"])
def test_a_part_that_is_killed_is_started_again(part: str, root: Path, up: dict[str, str]) -> None:
    before = parts(root)
    os.kill(before[part], signal.SIGKILL)
    until(lambda: parts(root).get(part, before[part]) != before[part], 30)
    if part in asked(up):
        address, data = asked(up)[part]

        def answers() -> bool:
            try:
                return status(address, password(root), data) == 200
            except OSError:
                return False

        until(answers, 60)
    assert {name: pid for name, pid in parts(root).items() if name != part} == {n: p for n, p in before.items() if n != part}


def test_services_of_another_host_are_not_stopped_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stack.HOME.mkdir()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        stack.write_state(stack.State({"mlflow": 1, "prefect": 1, "worker": 1}, supervisor=f"elsewhere:{other.pid}:5"))
        with pytest.raises(ServiceError, match=r"started on the host elsewhere: stop them there, or remove \.services/state\.json"):
            stack.down()
        assert other.poll() is None and stack.STATE.is_file()
        other.kill()


@pytest.mark.parametrize("supervisor", ["", "gone:15:99"])  # of a start that was killed, and of a container that is gone
def test_services_that_are_not_there_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supervisor: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    stack.HOME.mkdir()
    stack.write_state(stack.State({"mlflow": 9, "prefect": 9, "worker": 9}, supervisor=supervisor))
    stack.use_services()
    assert stack.running() is None and "PREFECT_API_URL" not in os.environ


def test_the_password_is_one_for_all_and_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: stack.password(), range(8)))) == 1
    assert stat.S_IMODE(stack.SECRETS.stat().st_mode) == 0o600 and list(stack.HOME.iterdir()) == [stack.SECRETS]
