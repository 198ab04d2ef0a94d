"""A scratch copy of the project, in which the notebooks of this directory run, so that they leave your working tree alone.

from scratch import PROJECT, run
run("cm3leon", "configure", "photos")
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OF_SERVERS = ("MLFLOW_", "PREFECT_", "DVC_")
"""Beginnings of variables that would bring the runs of a notebook to your servers and databases."""


def copy_project() -> Path:
    """Copy what git knows of the project, but for the versions of its outputs, to a new directory below the system's temporary one."""
    project = Path(tempfile.mkdtemp(prefix="cm3leon-"))
    command = ["git", "ls-files", "-coz", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and name != "dvc.lock":
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project / name)
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    return project


PROJECT = copy_project()
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(OF_SERVERS)} | {
    "PYTHONPATH": str(PROJECT),
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "COLUMNS": "120",
}


def run(*command: str) -> None:
    """Run a command in the scratch copy and show what it prints; also its log where it fails.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    done = subprocess.run(command, cwd=PROJECT, env=ENVIRONMENT, check=False, capture_output=True, text=True)
    print(done.stdout if done.returncode == 0 else done.stdout + done.stderr, end="")
    done.check_returncode()
