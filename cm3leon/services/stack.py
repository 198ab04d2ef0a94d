"""``cm3leon up`` and ``cm3leon down``: MLflow, Prefect and a worker on 127.0.0.1, in the background, behind a password.

    .services/secrets.json    user and password, made once; mode 600
    .services/state.json      supervisor and addresses, while the services are up; mode 600
    .services/logs/           a log for each part

One process, the supervisor (``cm3leon/services/supervisor.py``), starts the parts and starts again what dies or stops answering.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from cm3leon.services.automations import mark_stuck_runs
from cm3leon.services.environment import PREFECT_HOME, SERVICES_FILE, child_path, prepare_project
from cm3leon.services.events import post
from cm3leon.services.leftovers import SERVICES, end_leftover_processes
from cm3leon.services.local import HOST, ServiceError, answers, free_port, pages_environment
from cm3leon.services.mlflow_server import CREDENTIALS_ENV
from cm3leon.tracking.sqlite import has_uri_characters, sqlite_uri
from cm3leon.tracking.store import warn
from cm3leon.utils.processes import has_ended, is_here, pid_of, stop_tree

HOME = SERVICES_FILE.parent
SECRETS, STATE, LOGS, DEPLOYED = HOME / "secrets.json", SERVICES_FILE, HOME / "logs", HOME / "deployed"
USER = "cm3leon"
POOL = "local"
DEPLOYMENTS = Path("prefect.yaml")

MLFLOW_DATABASE, PREFECT_DATABASE = "CM3LEON_MLFLOW_DATABASE_URL", "CM3LEON_PREFECT_DATABASE_URL"
"""Addresses of databases for the two servers, such as PostgreSQL's; unset: SQLite files in the project."""

START_SECONDS = 180.0
"""How long all parts together may take to answer."""
STOP_SECONDS = 60.0
"""How long the supervisor may take to stop its parts."""


@dataclass(frozen=True)
class State:
    """Where the services are.

    Attributes:
        supervisor: identity of its process (:mod:`cm3leon.utils.processes`).
        ports: of 127.0.0.1, by part.
        mlflow_database, prefect_database: addresses; empty for SQLite.
    """

    ports: dict[str, int]
    mlflow_database: str = ""
    prefect_database: str = ""
    supervisor: str = ""

    @property
    def mlflow(self) -> str:
        """Address of the MLflow server."""
        return f"http://{HOST}:{self.ports['mlflow']}"

    @property
    def prefect(self) -> str:
        """Address of the Prefect server, without ``/api``."""
        return f"http://{HOST}:{self.ports['prefect']}"


@dataclass(frozen=True)
class Part:
    """A process that the supervisor keeps running.

    Attributes:
        arguments: of ``python``.
        environment: variables in addition to the supervisor's.
        health: address that answers while the part works; 401 is an answer too.
        needs: address of what the part asks; while that does not answer, the part may not either and is left alone. Empty: nothing.
    """

    name: str
    arguments: list[str]
    health: str
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    needs: str = ""


def read_state() -> State | None:
    """The state of services that are up; None if there are none."""
    try:
        state = State(**json.loads(STATE.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return None if has_ended(state.supervisor) else state


def running() -> State | None:
    """The state of services that have started and can be reached from here, else None: a host that is gone leaves its state."""
    state = read_state()
    if state is None or not state.supervisor:
        return None
    return state if is_here(state.supervisor) or answers(f"{state.prefect}/api/health") else None


def write_state(state: State) -> None:
    """Write the state, for its owner alone: the databases' addresses have passwords. A reader never sees half of it."""
    draft = STATE.with_suffix(".draft")
    draft.touch(mode=0o600)
    draft.write_text(json.dumps(asdict(state), indent=2) + "\n")
    draft.replace(STATE)


def password() -> str:
    """The services' password; made at the first call."""
    HOME.mkdir(exist_ok=True)
    if not SECRETS.exists():
        made = json.dumps({"user": USER, "password": secrets.token_urlsafe(24)}) + "\n"
        with tempfile.NamedTemporaryFile("w", dir=HOME, delete=False) as draft:  # for its owner alone, and never half of it
            draft.write(made)
        try:
            os.link(draft.name, SECRETS)
        except FileExistsError:  # another process was first
            pass
        except OSError:  # the disk has no links
            Path(draft.name).replace(SECRETS)
        Path(draft.name).unlink(missing_ok=True)
    return str(json.loads(SECRETS.read_text())["password"])


def client_environment(state: State) -> dict[str, str]:
    """Variables with which MLflow's and Prefect's clients reach the services.

    Runs on this host write to a SQLite store directly: models need not pass through the server, and training does not wait for it.
    """
    credentials = f"{USER}:{password()}"
    return {
        "PREFECT_API_URL": f"{state.prefect}/api",
        "PREFECT_API_AUTH_STRING": credentials,
        "MLFLOW_TRACKING_URI": state.mlflow if state.mlflow_database else sqlite_uri(Path("mlflow.db")),
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": password(),
    }


def use_services() -> None:
    """Set the variables of the clients if the services are up; variables that are set keep their values.

    MLflow's are set only where its store is a database of its own: a SQLite store is in the project and needs none.
    """
    if "PREFECT_API_URL" in os.environ or (state := running()) is None:
        return
    for name, value in client_environment(state).items():
        if state.mlflow_database or not name.startswith("MLFLOW"):
            os.environ.setdefault(name, value)


def parts(state: State) -> list[Part]:
    """The parts, in the order in which they start; they stop in the reverse order."""
    clients = client_environment(state)
    database = state.mlflow_database or sqlite_uri(Path("mlflow.db"))
    artifacts = Path("mlruns").absolute().as_uri()
    prefect = {"PREFECT_HOME": str(PREFECT_HOME.absolute()), "PREFECT_SERVER_API_AUTH_STRING": clients["PREFECT_API_AUTH_STRING"]}
    prefect |= pages_environment(state.prefect)
    if state.prefect_database or has_uri_characters(PREFECT_HOME.absolute()):
        own = sqlite_uri(PREFECT_HOME / "prefect.db", driver="aiosqlite")
        prefect["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = state.prefect_database or own
    health_port = str(state.ports["worker"])
    return [
        Part(
            "mlflow",
            ["-m", "cm3leon.services.mlflow_server", artifacts, str(state.ports["mlflow"])],
            f"{state.mlflow}/health",
            {CREDENTIALS_ENV: clients["PREFECT_API_AUTH_STRING"], "MLFLOW_TRACKING_URI": database},
        ),
        Part(
            "prefect",
            ["-m", "prefect", "server", "start", "--host", HOST, "--port", str(state.ports["prefect"])],
            f"{state.prefect}/api/health",
            prefect,
        ),
        Part(
            "worker",
            ["-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--with-healthcheck"],
            f"http://{HOST}:{health_port}/health",
            {**clients, "PATH": child_path(), "PREFECT_WORKER_WEBSERVER_HOST": HOST, "PREFECT_WORKER_WEBSERVER_PORT": health_port},
            needs=f"{state.prefect}/api/ready",
        ),
    ]


def up(mlflow_port: int = 5000, prefect_port: int = 4200) -> State:
    """Start the services if they are not up, and create the deployments of ``prefect.yaml``. A second call waits for the first.

    Args:
        mlflow_port, prefect_port: to listen on; the next free one if one is in use.

    Raises:
        ServiceError: if a part does not answer in time.
    """
    HOME.mkdir(exist_ok=True)
    with (HOME / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _up(mlflow_port, prefect_port)


def _up(mlflow_port: int, prefect_port: int) -> State:
    if state := running():
        _deploy(state)  # which an interrupted start may not have come to
        mark_stuck_runs(client_environment(state))
        return state
    if (state := read_state()) and state.supervisor:
        warn(f"{STATE} is of the host {state.supervisor.split(':')[0]}; if services still run there on these databases, stop them")
    end_leftover_processes(SERVICES)  # of a supervisor that was killed: they hold ports, and the worker takes runs
    if MLFLOW_DATABASE not in os.environ:
        prepare_project(needs_store=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    ports = {"mlflow": free_port(mlflow_port), "prefect": free_port(prefect_port), "worker": free_port(0)}
    password()
    write_state(State(ports, os.environ.get(MLFLOW_DATABASE, ""), os.environ.get(PREFECT_DATABASE, "")))
    with (LOGS / "supervisor.log").open("ab") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "cm3leon.services.supervisor"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        state = _wait_until_up(supervisor)
        _deploy(state)
        mark_stuck_runs(client_environment(state))
    except BaseException:
        stop_tree(supervisor.pid, STOP_SECONDS)
        STATE.unlink(missing_ok=True)
        raise
    return state


def _wait_until_up(supervisor: subprocess.Popen[bytes]) -> State:
    """Wait until the supervisor has announced itself, which it does once all parts answer."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        state = read_state()
        if state and state.supervisor:
            return state
        if supervisor.poll() is not None:
            break
        time.sleep(0.3)
    last = (LOGS / "supervisor.log").read_text(errors="replace").strip().splitlines()[-1:]
    raise ServiceError(f"the services did not start: {' '.join(last).removeprefix('error: ')}; their logs are in {LOGS}/")


def _deploy(state: State) -> None:
    """Create the deployments, and again only after ``prefect.yaml``, the database or the project's place changed, or if all are gone.

    What was switched in the UI stays.
    """
    content = hashlib.sha256(DEPLOYMENTS.read_bytes() + f"{Path.cwd()} {state.prefect_database}".encode()).hexdigest()
    present = DEPLOYED.is_file() and DEPLOYED.read_text() == content
    if present and post("deployments/count", {}, client_environment(state)):  # 0: a new database in the place of the former
        return
    environment = {**os.environ, **client_environment(state), "PREFECT_HOME": str(PREFECT_HOME.absolute())}
    prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
    # The worker makes the pool too, but may be later; it is no fault if there is one.
    subprocess.run([*prefect, "work-pool", "create", POOL, "--type", "process"], env=environment, capture_output=True, check=False)
    command = [*prefect, "deploy", "--all"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ServiceError(f"the deployments of {DEPLOYMENTS} were not created:\n{(done.stdout + done.stderr)[-2000:]}")
    DEPLOYED.write_text(content)


def down() -> bool:
    """Stop the services; False if none are up.

    Raises:
        ServiceError: if they run on another host.
    """
    state = read_state()
    if state is None or not state.supervisor:
        STATE.unlink(missing_ok=True)
        return bool(end_leftover_processes(SERVICES))
    if not is_here(state.supervisor):
        host = state.supervisor.split(":")[0]
        raise ServiceError(f"the services were started on the host {host}: stop them there, or remove {STATE} if that host is gone")
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid_of(state.supervisor))
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except psutil.TimeoutExpired:
            stop_tree(process.pid, 5)
    STATE.unlink(missing_ok=True)
    return True
