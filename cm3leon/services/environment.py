"""Environment of the processes of a run, and preparation of a new clone for its first run.

This package does not import Prefect or DVC. It names their variables and files because it starts both as child processes, which are
configured through the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

from cm3leon.utils import telemetry
from cm3leon.utils.errors import UserError
from cm3leon.utils.network import reach_local_servers
from cm3leon.utils.processes import has_ended

PREFECT_HOME = Path(".prefect")
SERVER_FILE = PREFECT_HOME / "server.json"
"""The process of ``cm3leon ui`` and the addresses of its servers by name, while it runs, so that runs use and link them."""


class ProjectError(UserError):
    """The working directory is not the root of a project."""


def use_environment() -> None:
    """Turn telemetry off and set Prefect's home and server; call before importing prefect. Variables that are set keep their values.

    Prefect has its database in ``./.prefect``. Without ``PREFECT_API_URL`` a run uses the server of ``cm3leon ui`` if that is running,
    else a temporary server on the same database.
    """
    telemetry.turn_off()
    reach_local_servers()
    os.environ.setdefault("PYTHONUNBUFFERED", "1")  # a stage's lines reach the log of the run as they are written
    os.environ.setdefault("PREFECT_HOME", str(PREFECT_HOME.absolute()))
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


def child_path() -> str:
    """PATH with this interpreter's directory first, so that commands of stages find ``cm3leon`` in an environment that is not activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def prepare_project() -> list[str]:
    """Prepare a new clone for its first run; idempotent. Returns a line about each of parameters, DVC and MLflow.

    Raises:
        cm3leon.utils.errors.ConfigError: if ``params.yaml`` is missing or invalid.
        ProjectError: if the directory is not the project's root.
    """
    from cm3leon.config.loading import load_config
    from cm3leon.tracking.store import prepare_store

    if not Path("dvc.yaml").is_file():
        raise ProjectError(f"{Path.cwd()} has no dvc.yaml; run the command in the project's root")
    config = load_config()
    lines = [f"parameters: params.yaml, profile {config.profile}"]
    inside = subprocess.run(["git", "rev-parse", "--is-inside-work-tree"], capture_output=True, check=False).returncode == 0
    local = Path(".dvc/config.local")
    # DVC expects a git repository; an unpacked archive is none.
    if not inside and "no_scm" not in (local.read_text() if local.is_file() else ""):
        with local.open("a") as file:
            file.write("[core]\n    no_scm = true\n")
    lines.append(f"DVC: .dvc/cache, {'with' if inside else 'without'} git")
    try:
        lines.append(f"MLflow: {prepare_store()}")
    except ConnectionError as error:
        lines.append(f"MLflow: {error}; stages run untracked")
    return lines
