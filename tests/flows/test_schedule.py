"""A schedule starts a run by itself: a real server, a real worker, the deployment of prefect.yaml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from flows_support import ROOT, make_toy

from cm3leon.services.environment import child_path
from cm3leon.services.worktree import WORKTREE
from cm3leon.utils.processes import stop_tree


def test_prefects_server_can_be_imported() -> None:
    """Newer versions of fastapi break it, and pip check does not notice."""
    subprocess.run([sys.executable, "-c", "import prefect.server.api.server"], check=True, timeout=120)


@pytest.fixture
def nightly(tmp_path: Path) -> Path:
    """The toy project with the flows and the deployment of this one, due every minute."""
    make_toy(tmp_path)
    shutil.copytree(ROOT / "flows", tmp_path / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    definition = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    definition["deployments"] = [deployment for deployment in definition["deployments"] if deployment["name"] == "nightly"]
    [deployment] = definition["deployments"]
    assert deployment["schedules"] == [{"cron": "0 2 * * *", "timezone": "UTC", "active": False}]
    deployment["schedules"] = [{"cron": "* * * * *", "timezone": "UTC", "active": True}]
    deployment["parameters"] = {"promote": False}
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump(definition))
    (tmp_path / ".gitignore").write_text(".cache/\n/out/\n/models/\n*.log\n/home/\n")
    subprocess.run(["git", "add", "--all"], cwd=tmp_path, check=True)
    subprocess.run(["git", "-c", "user.name=me", "-c", "user.email=me@here", "commit", "-qm", "toy"], cwd=tmp_path, check=True)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_of_nightly_starts_by_itself(nightly: Path, prefect_server: str) -> None:
    environment = {
        **os.environ,
        "PREFECT_API_URL": prefect_server,
        "PREFECT_HOME": str(nightly / "home"),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PATH": child_path(),
    }
    environment |= {"PYTHONPATH": f"{nightly}{os.pathsep}{ROOT}", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}

    def prefect(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "prefect", "--no-prompt", *arguments]

    since = datetime.now(UTC)
    with (nightly / "commands.log").open("w") as output:
        options: dict[str, Any] = {"cwd": nightly, "env": environment, "stdout": output, "stderr": subprocess.STDOUT}
        subprocess.run(prefect("work-pool", "create", "local", "--type", "process", "--overwrite"), check=True, **options)
        subprocess.run(prefect("deploy", "--all"), check=True, **options)
        worker = subprocess.Popen(prefect("worker", "start", "--pool", "local"), **options)
        try:
            run = wait_for_a_finished_run(180, since)
        finally:
            stop_tree(worker.pid)
            subprocess.run(prefect("deployment", "delete", "cm3leon/nightly"), check=True, **options)
    assert run is not None, (nightly / "commands.log").read_text()[-4000:]
    assert run.state.is_completed(), (nightly / "commands.log").read_text()[-8000:]
    assert run.name.startswith("small ") and "cm3leon" in run.tags
    assert (nightly / WORKTREE / "out/third").is_file() and not (nightly / "out").exists()


def wait_for_a_finished_run(seconds: float, since: datetime) -> Any:
    """The first run of the deployment that was made after ``since`` and has ended; None if there is none in time.

    Runs of other tests are on the same server.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

    end = time.monotonic() + seconds
    with get_client(sync_client=True) as client:
        while time.monotonic() < end:
            runs = client.read_flow_runs(deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=["nightly"])))
            if ended := [run for run in runs if run.state.is_final() and run.created > since]:
                assert ended[0].auto_scheduled
                return ended[0]
            time.sleep(1)
    return None
