"""What the processes of a run need in their environment, and what a fresh clone needs before its first run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

from cm3leon.utils import telemetry
from cm3leon.utils.errors import UserError

PREFECT_HOME = Path(".prefect")
SERVER_FILE = PREFECT_HOME / "server.json"
"""Written by ``cm3leon ui`` while its Prefect server is up, so that a run started meanwhile uses it."""

UNBUFFERED = "PYTHONUNBUFFERED"
"""Set, so that a stage's lines reach the run's log when they are written."""


class ProjectError(UserError):
    """The working directory is not the project's root."""


def use_environment() -> None:
    """Turn telemetry off and find Prefect's server; call before importing prefect. What the user has set stays.

    Prefect keeps its database in ``./.prefect``. Without ``PREFECT_API_URL`` a run uses the server of ``cm3leon ui`` where one is up,
    else Prefect starts a temporary one on the same database.
    """
    telemetry.turn_off()
    os.environ.setdefault(UNBUFFERED, "1")
    os.environ.setdefault("PREFECT_HOME", str(PREFECT_HOME.absolute()))
    if "PREFECT_API_URL" not in os.environ and (url := running_server()):
        os.environ["PREFECT_API_URL"] = url


def running_server() -> str | None:
    """The API address of this project's own Prefect server, if it answers."""
    try:
        url = str(json.loads(SERVER_FILE.read_text())["api_url"])
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return url
    except (OSError, ValueError, KeyError):
        return None


def child_path() -> str:
    """PATH with this interpreter's directory first: stage commands find ``cm3leon`` also when the environment is not activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def prepare_project() -> list[str]:
    """Make a fresh clone ready for its first run; idempotent. Returns a line for each thing found or made.

    Raises:
        cm3leon.config.ConfigError: if ``params.yaml`` is missing or wrong.
        ProjectError: if the directory is not the project's root.
    """
    from cm3leon.config.schema import load_config
    from cm3leon.tracking.runs import prepare_store

    if not Path("dvc.yaml").is_file():
        raise ProjectError(f"{Path.cwd()} holds no dvc.yaml; run this in the project's root")
    config = load_config()
    lines = [f"parameters: params.yaml, profile {config.profile}"]
    inside = subprocess.run(["git", "rev-parse", "--is-inside-work-tree"], capture_output=True, check=False).returncode == 0
    local = Path(".dvc/config.local")
    if not inside and "no_scm" not in (local.read_text() if local.is_file() else ""):
        with local.open("a") as file:
            file.write("[core]\n    no_scm = true\n")
    lines.append(f"DVC: .dvc/cache, {'with' if inside else 'without'} git")
    try:
        lines.append(f"MLflow: {prepare_store()}")
    except ConnectionError as error:
        lines.append(f"MLflow: {error}; stages run untracked")
    return lines
