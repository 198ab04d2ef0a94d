"""A run that cannot begin says so in one line, before anything is started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cm3leon.services.exclusive import alone_in_directory

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def clone(project: Path) -> Path:
    """A project as a clone has it."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(ROOT / name, project / name)
    shutil.copytree(ROOT / ".dvc", project / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    subprocess.run(["git", "init", "--quiet"], check=True)
    shutil.copytree(ROOT / "configs", project / "configs")
    return project


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"PREFECT_API_URL": "http://127.0.0.1:9/api"}, "http://127.0.0.1:9/api cannot be used: it does not answer"),
        ({"PREFECT_API_URL": "nonsense"}, "nonsense cannot be used: it is no Prefect API"),
        ({"MLFLOW_TRACKING_URI": "mysql+pymysql://user:secret@host/db"}, "install the driver pymysql, or change MLFLOW_TRACKING_URI"),
        ({"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "start it, or correct or unset MLFLOW_TRACKING_URI"),
    ],
)
def test_a_server_or_store_that_cannot_be_used_is_one_line(clone: Path, variables: dict[str, str], complaint: str) -> None:
    line = refused(variables)
    assert complaint in line and "secret" not in line


def test_a_second_run_in_the_directory_is_one_line_and_changes_nothing(clone: Path) -> None:
    before = Path("params.yaml").read_bytes()
    with alone_in_directory():
        line = refused({}, "--profile", "tiny")
    assert f"another run works in {clone} (process {os.getpid()})" in line
    assert Path("params.yaml").read_bytes() == before


def test_weights_that_are_not_there_are_one_line(clone: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "cm3leon", "configure", "tiny", "--set", "image_tokenizer.perceptual_weight=1.0",
         "--set", "image_tokenizer.perceptual_weights=weights/vgg16.safetensors", "--set", "evaluate.inception=weights/fid.pth"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True,
    )  # fmt: skip
    line = refused({})
    assert "not there: image_tokenizer.perceptual_weights weights/vgg16.safetensors; evaluate.inception weights/fid.pth. Put" in line


def refused(variables: dict[str, str], *arguments: str) -> str:
    """The one line with which a run in the working directory refuses to begin."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    command = [sys.executable, "-m", "flows.pipeline", *arguments]
    environment = kept | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    [line] = (done.stdout + done.stderr).splitlines()
    assert line.startswith("error: ")
    return line
