"""A whole project with profile tiny: its runs, how a fresh clone gets the champion, and what gc leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from flows_support import ROOT

from cm3leon.config.profiles import load_profile
from cm3leon.services.disk import estimate, tree_size

pytestmark = pytest.mark.slow
WRITTEN = ("data", "models", ".dvc/cache", "mlruns", "mlflow.db")
PROFILE = "tiny"


class Project:
    """A clone, and its MLflow store or another's."""

    def __init__(self, root: Path, store: Path, server: str = "") -> None:
        self.root = root
        foreign = ("MLFLOW_RUN_ID", "SHELL", "CM3LEON_PARENT_RUN_ID", "PREFECT_API_URL")
        kept = {name: value for name, value in os.environ.items() if name not in foreign}
        path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
        python_path = os.pathsep.join([str(root), kept.get("PYTHONPATH", "")])
        own = {"PATH": path, "PYTHONPATH": python_path, "MLFLOW_TRACKING_URI": f"sqlite:///{store}", "COLUMNS": "160"}
        self.environment = {**kept, **own} | ({"PREFECT_API_URL": server} if server else {})

    def run(self, *arguments: str, module: str = "cm3leon") -> str:
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        return done.stdout

    def git(self, *arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=me", "-c", "user.email=me@here", *arguments], cwd=self.root, check=True)

    def written(self) -> int:
        """Bytes that runs have written."""
        return sum(tree_size(self.root / name) for name in WRITTEN)

    def hashes(self) -> dict[str, list[str]]:
        """Stage -> content hashes of its outputs, from dvc.lock."""
        stages = yaml.safe_load((self.root / "dvc.lock").read_text())["stages"]
        return {name: [out["md5"] for out in stage["outs"]] for name, stage in stages.items()}

    def runs_of(self, stage: str) -> list[Any]:
        """MLflow's runs of a stage or of the pipeline, newest first."""
        from mlflow import MlflowClient

        client = MlflowClient(self.environment["MLFLOW_TRACKING_URI"])
        return list(client.search_runs([client.get_experiment_by_name("cm3leon").experiment_id], f"tags.stage = '{stage}'"))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Project:
    """What a clone of the working tree has: tracked files, and new ones that git does not ignore."""
    root = tmp_path_factory.mktemp("whole") / "first"
    project = Project(root, root / "mlflow.db", prefect_server)
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and name != "dvc.lock":
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    project.git("init", "--quiet")
    project.run("configure", PROFILE)
    project.run("remote", "add", "--default", "storage", str(root.parent / "remote"), module="dvc")
    project.git("add", "--all")
    project.git("commit", "--quiet", "--no-verify", "-m", "project")
    return project


def states_in(table: str, stages: list[str]) -> dict[str, str]:
    """Stage -> state, read from the final table."""
    rows = [[cell.strip() for cell in line.split("│")] for line in table.splitlines() if "│" in line]
    return {row[1]: row[2] for row in rows if len(row) > 2 and row[1] in stages}


@pytest.mark.timeout(1500)
def test_the_project_is_run_again_and_asked_something_else(clone: Project) -> None:
    stages = list(yaml.safe_load((clone.root / "dvc.yaml").read_text())["stages"])
    before = clone.written()
    first = clone.run(module="flows.pipeline")
    assert "version 1 is the champion" in first
    assert states_in(first, stages) == dict.fromkeys(stages, "Completed")
    assert (clone.root / "models/evaluation/samples.png").is_file()
    assert json.loads((clone.root / "models/runs/evaluate/mlflow_run.json").read_text())["run_id"]
    trained = json.loads((clone.root / "models/finetuned/training.json").read_text())
    assert {"text_to_image", "caption", "vqa"} <= set(trained["tasks"]) and trained["masked_prompts"]
    needed = sum(estimate(load_profile(PROFILE, configs=ROOT / "configs")).values())
    assert 0.5 < (clone.written() - before) / needed < 2
    outputs = clone.hashes()

    second = clone.run(module="flows.pipeline")
    assert states_in(second, [*stages, "drift"]) == dict.fromkeys([*stages, "drift"], "Skipped")  # the data is the champion's
    assert "version 1 is the champion" in second  # an unchanged model is not registered again
    assert clone.hashes() == outputs
    rates = {
        name: value for stage in stages for run in clone.runs_of(stage) for name, value in run.data.metrics.items() if "per_second" in name
    }
    assert rates.keys() >= {f"{stage}/images_per_second" for stage in ("image_tokenizer", "tokenize", "encoder", "super_resolution")}
    assert rates.keys() >= {"index/documents_per_second", "tokenize/decoded_per_second", "index/decoded_per_second"}
    assert min(rates.values()) > 0
    newest, oldest = clone.runs_of("pipeline")
    scores = {name: score for name, score in oldest.data.metrics.items() if name.startswith("eval/")}
    assert scores and scores.items() <= newest.data.metrics.items()  # of the evaluation that was up to date
    assert not [name for name in newest.data.metrics if name.endswith("_seconds")]
    assert {"raw", "validated", "tokens"} == {i.dataset.name for i in newest.inputs.dataset_inputs if i.dataset.digest != "untracked"}
    assert [run.data.tags["registered_version"] for run in (newest, oldest)] == ["cm3leon/1"] * 2
    assert [run.info.run_name.split(" · ")[:2] for run in (newest, oldest)] == [["tiny", "same parameters"], ["tiny", "first run"]]
    assert newest.data.tags["dvc_lock_md5"] == oldest.data.tags["dvc_lock_md5"]

    # The same model, asked something else: the champion is evaluated again, and is found equal by pairs.
    clone.run("configure", PROFILE, "--set", "evaluate.seed=1")
    third = clone.run(module="flows.pipeline")
    assert "the champion was evaluated again (captioned, images, prompts" in third
    assert "version 2 is the champion, passed" in third

    from prefect.artifacts import Artifact

    reports = {key: Artifact.get(key) for key in ("pipeline-report", "gate-report")}  # the newest of each: other flows have run here
    assert "**composition " in str(reports["pipeline-report"].data)  # also of a skipped evaluation
    assert "version 2 is the champion" in str(reports["pipeline-report"].data)
    assert "| clip_score |" in str(reports["gate-report"].data) and "+0 [+0, +0], 12 pairs" in str(reports["gate-report"].data)


@pytest.mark.timeout(1500)
def test_a_fresh_clone_gets_the_champion_and_reproduces_its_evaluation(clone: Project, tmp_path: Path) -> None:
    assert "files pushed" in clone.run("data", "push")
    second = Project(tmp_path / "second", clone.root / "mlflow.db")
    subprocess.run(["git", "clone", "--quiet", str(clone.root), str(second.root)], check=True)
    assert not (second.root / "models").exists()
    assert "those of version 2" in second.run("data", "pull", "--version", "@champion")
    assert (second.root / "dvc.lock").read_bytes() == (clone.root / "dvc.lock").read_bytes()
    shown = second.run("evaluate", "--reproduce", "models/evaluation/record.json")
    count = shown.split(" of ")[0].split()[-1]
    assert f"{count} of {count} scores of models/evaluation/record.json agree" in shown and int(count) > 10

    # All that the champion needs stays in the cache, whatever takes its place and is cleaned away.
    clone.run("gc", "--keep", "1")
    shutil.rmtree(clone.root.parent / "remote")
    shutil.rmtree(clone.root / "models")
    clone.run("checkout", "--force", module="dvc")
    assert (clone.root / "models/finetuned/model.safetensors").is_file()
