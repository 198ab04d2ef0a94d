"""A whole project with profile tiny: what it writes, how a fresh clone gets the champion, and what gc leaves of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cm3leon.config.profiles import load_profile
from cm3leon.services.disk import estimate, tree_size

ROOT = Path(__file__).parents[2]
WRITTEN = ("data", "models", ".dvc/cache", "mlruns", "mlflow.db")


class Project:
    """A clone, and its MLflow store or another's."""

    def __init__(self, root: Path, store: Path) -> None:
        self.root = root
        kept = {name: value for name, value in os.environ.items() if name not in ("MLFLOW_RUN_ID", "SHELL", "CM3LEON_PARENT_RUN_ID")}
        path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
        python_path = os.pathsep.join([str(root), kept.get("PYTHONPATH", "")])
        self.environment = {**kept, "PATH": path, "PYTHONPATH": python_path, "MLFLOW_TRACKING_URI": f"sqlite:///{store}"}

    def run(self, *arguments: str, module: str = "cm3leon") -> str:
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    def git(self, *arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=me", "-c", "user.email=me@here", *arguments], cwd=self.root, check=True)


def written(project: Path) -> int:
    return sum(tree_size(project / name) for name in WRITTEN)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_champion_is_shared_reproduced_and_never_collected(tmp_path: Path) -> None:
    # 1. A run writes what was estimated.
    first = Project(tmp_path / "first", tmp_path / "first" / "mlflow.db")
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and name != "dvc.lock":
            (first.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, first.root / name)
    first.git("init", "--quiet")
    first.run("configure", "tiny")
    first.run("remote", "add", "--default", "storage", str(tmp_path / "remote"), module="dvc")
    first.git("add", "--all")
    first.git("commit", "--quiet", "--no-verify", "-m", "project")
    before = written(first.root)
    first.run("repro", module="dvc")
    first.run("register")
    first.run("promote", "--force", "--reason", "the first")
    needed = sum(estimate(load_profile("tiny", configs=ROOT / "configs")).values())
    assert 0.5 < (written(first.root) - before) / needed < 2
    assert "files pushed" in first.run("data", "push")
    champion_lock = (first.root / "dvc.lock").read_bytes()

    # 2. Another run, whose version is not promoted; its outputs take the places of the champion's.
    first.run("configure", "tiny", "--set", "sft.steps=19", "--set", "decoding.candidates=1")
    first.run("repro", module="dvc")
    assert "version 2" in first.run("register")

    # 3. A fresh clone gets the champion from remote and registry, and reproduces its evaluation.
    second = Project(tmp_path / "second", tmp_path / "first" / "mlflow.db")
    subprocess.run(["git", "clone", "--quiet", str(first.root), str(second.root)], check=True)
    assert not (second.root / "models").exists()
    assert "those of version 1" in second.run("data", "pull", "--version", "@champion")
    assert (second.root / "dvc.lock").read_bytes() == champion_lock
    shown = second.run("evaluate", "--reproduce", "models/evaluation/record.json")
    count = shown.split(" of ")[0].split()[-1]
    assert f"{count} of {count} scores of models/evaluation/record.json agree" in shown and int(count) > 10

    # 4. A third version, after which gc drops the second with its data, but nothing of the champion's.
    first.run("configure", "tiny", "--set", "sft.steps=18", "--set", "decoding.candidates=1")
    first.run("repro", module="dvc")
    assert "version 3" in first.run("register")
    size = written(first.root)
    planned = first.run("gc", "--keep", "1", "--dry-run")
    assert written(first.root) == size
    assert "version 2" in planned and "models/checkpoints/sft.old" in planned and "objects of DVC's cache" in planned
    done = first.run("gc", "--keep", "1")
    freed = int(done.rpartition("freed: ")[2].split()[0].replace(",", ""))
    assert freed == pytest.approx(size - written(first.root), rel=0.02)
    assert freed == int(planned.rpartition("would be freed: ")[2].split()[0].replace(",", ""))
    shutil.rmtree(tmp_path / "remote")  # all that the champion needs is in the cache
    shutil.rmtree(first.root / "models")
    (first.root / "dvc.lock").write_bytes(champion_lock)
    first.run("checkout", "--force", module="dvc")
    assert (first.root / "models/finetuned/model.safetensors").is_file()
