"""Environment of the processes of a run, and preparation of a new clone for its first run.

This package does not import Prefect or DVC. It names their variables and files because it starts both as child processes, which are
configured through the environment.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from cm3leon.tracking.sqlite import has_uri_characters, sqlite_uri
from cm3leon.tracking.store import health_address, warn, without_password
from cm3leon.utils import telemetry
from cm3leon.utils.errors import UserError
from cm3leon.utils.network import reach_local_servers
from cm3leon.utils.processes import has_ended

PREFECT_HOME = Path(".prefect")
SERVER_FILE = PREFECT_HOME / "server.json"
"""The process of ``cm3leon ui`` and the addresses of its servers by name, while it runs, so that runs use and link them."""

SERVICES_FILE = Path(".services/state.json")
"""Addresses of the services of ``cm3leon up``, while they are up."""

DATABASE_VARIABLES = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")
"""Prefect's names, present and former, for the address of its database."""
DVC_LOCAL = Path(".dvc/config.local")
WITHOUT_GIT = "no_scm"
"""Setting in ``core`` of DVC's local configuration that :func:`prepare_project` makes as long as there is no git repository."""


class ProjectError(UserError):
    """The working directory is not the root of a project."""


class ServerError(UserError):
    """The Prefect server that the environment names cannot be used."""


def use_environment() -> None:
    """Turn telemetry off and set Prefect's home and server; call before importing prefect. Variables that are set keep their values.

    Prefect has its database in ``./.prefect``. Without ``PREFECT_API_URL`` a run uses the servers of ``cm3leon up`` or ``cm3leon ui`` if
    they are running, else a temporary server on the same database. A run in the worktree of deployments has the project's MLflow store,
    and its stages the worktree's code.
    """
    from cm3leon.services.worktree import project_of

    if project := project_of(Path.cwd()):
        os.environ.setdefault("MLFLOW_TRACKING_URI", sqlite_uri(project / "mlflow.db"))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    telemetry.turn_off()
    reach_local_servers()
    os.environ.setdefault("PYTHONUNBUFFERED", "1")  # a stage's lines reach the log of the run as they are written
    home = Path(os.environ.setdefault("PREFECT_HOME", str(PREFECT_HOME.absolute())))
    if has_uri_characters(home) and not os.environ.keys() & set(DATABASE_VARIABLES):
        os.environ[DATABASE_VARIABLES[0]] = sqlite_uri(home / "prefect.db", driver="aiosqlite")
    if SERVICES_FILE.exists():
        from cm3leon.services.stack import use_services

        use_services()
    if "PREFECT_API_URL" not in os.environ and (url := running_server()):
        os.environ["PREFECT_API_URL"] = url


def ui_servers() -> dict[str, str]:
    """The addresses of the servers of ``cm3leon ui`` by name, MLflow, Prefect and Data Docs; empty if it is not running."""
    try:
        found = json.loads(SERVER_FILE.read_text())
        return {} if has_ended(found["process"]) else dict(found["servers"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def running_server() -> str | None:
    """The API address of the Prefect server of ``cm3leon ui``; None if none answers."""
    if "Prefect" not in (servers := ui_servers()):
        return None
    url = f"{servers['Prefect']}/api"
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return url
    except OSError:
        return None


def check_server() -> None:
    """Fail at once if ``PREFECT_API_URL`` is set to what is no Prefect API; Prefect's client would end with a traceback of its own.

    Raises:
        ServerError: with the address and the reason.
    """
    if not (url := os.environ.get("PREFECT_API_URL")):
        return
    try:
        with urllib.request.urlopen(health_address(url), timeout=10) as answer:
            problem = "" if json.loads(answer.read(100)) is True else "it is no Prefect API, whose address ends with /api"
    except urllib.error.HTTPError as error:
        problem = "" if error.code in (401, 403) else f"it answers {error}; a Prefect API's address ends with /api"
    except (OSError, HTTPException) as error:
        problem = f"it does not answer ({error})"
    except ValueError as error:
        problem = f"it is no Prefect API, whose address ends with /api ({error})"
    if problem:
        advice = "start it, or correct or unset PREFECT_API_URL: without it a run starts a server of its own"
        raise ServerError(f"the Prefect server {without_password(url)} cannot be used: {problem}; {advice}")


def child_path() -> str:
    """PATH with this interpreter's directory first, so that commands of stages find ``cm3leon`` in an environment that is not activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def prepare_project(needs_store: bool = False) -> list[str]:
    """Prepare a new clone for its first run; idempotent. Returns a line about each of parameters, DVC and MLflow.

    Args:
        needs_store: raise the error of an MLflow store that cannot be used, with which stages run untracked.

    Raises:
        cm3leon.tracking.store.StoreError: see ``needs_store``.
        cm3leon.utils.errors.ConfigError: if ``params.yaml`` is missing or invalid.
        ProjectError: if the directory is not the project's root.
    """
    from cm3leon.config.loading import load_config
    from cm3leon.tracking.store import StoreError, prepare_store

    if not Path("dvc.yaml").is_file():
        raise ProjectError(f"{Path.cwd()} has no dvc.yaml; run the command in the project's root")
    config = load_config()
    lines = [f"parameters: params.yaml, profile {config.profile}"]
    problem = git_problem()
    set_without_git(bool(problem))
    lines.append(f"DVC: .dvc/cache, {f'without git: {problem}' if problem else 'with git'}")
    try:
        lines.append(f"MLflow: {without_password(prepare_store())}")
    except StoreError as error:
        if needs_store:
            raise
        lines.append(f"MLflow: {error}; stages run untracked")
    return lines


def git_problem(root: Path = Path()) -> str:
    """Why git cannot be used in a directory, "" if it can. A refusal that the user did not choose is also a warning."""
    command = ["git", "rev-parse", "--is-inside-work-tree"]
    try:
        asked = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    except FileNotFoundError:
        return "git is not installed"
    if asked.returncode == 0:
        return ""
    if not (refused := re.search("dubious ownership in repository at (.*)", asked.stderr)):
        return "this directory is no git repository"
    problem = f"another user owns the repository, so git refuses it; to trust it: git config --global --add safe.directory {refused[1]}"
    warn(f"{problem}; until then commits are not recorded")
    return problem


def set_without_git(without: bool) -> None:
    """Tell DVC, which expects a git repository, whether it is to work without one; an unpacked archive is none.

    A ``false`` in the configuration is the user's, and stays.

    Raises:
        DvcError: if DVC cannot read its configuration.
    """
    from cm3leon.services.dvc_commands import local_settings, set_local

    name = f"core.{WITHOUT_GIT}"
    mentioned = DVC_LOCAL.is_file() and WITHOUT_GIT in DVC_LOCAL.read_text()  # DVC takes a second to answer
    present = local_settings().get(name, "").lower() if mentioned else ""
    if without and not present:
        set_local(name, "true")
    elif present == "true" and not without:
        set_local(name, None)
