"""Does ``dvc repro`` alone give the artifacts of the flow? python benchmarks/reproduce.py [--profile tiny]

Two fresh clones of HEAD in a temporary folder, each with a cache of its own: one runs the flow, the other ``dvc repro``. Then every
output of every stage is compared by content hash, but for ``models/runs``, which names the MLflow run. Exit status 1 if one differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def clone(to: Path, profile: str) -> dict[str, str]:
    """A fresh clone, its parameters written from the profile; returns the environment of its commands."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(to)], check=True)
    drop = ("MLFLOW_", "PREFECT_", "DVC_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    environment |= {"PYTHONPATH": str(to), "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    for command in (["configure", profile], ["setup"]):
        subprocess.run([sys.executable, "-m", "cm3leon", *command], cwd=to, env=environment, check=True)
    return environment


def hashes(project: Path) -> dict[str, str]:
    """Output -> content hash, from ``dvc.lock``; without those that name a run."""
    stages = yaml.safe_load((project / "dvc.lock").read_text())["stages"].values()
    return {out["path"]: out["md5"] for stage in stages for out in stage["outs"] if not out["path"].startswith("models/runs/")}


def main(profile: str) -> int:
    commands = {"flow": ["flows.pipeline", "--no-promote"], "dvc repro": ["dvc", "repro"]}
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in commands.items():
            project = Path(folder) / name.replace(" ", "-")
            environment = clone(project, profile)
            subprocess.run([sys.executable, "-m", *command], cwd=project, env=environment, check=True)
            found[name] = hashes(project)
    flow, alone = found.values()
    print("| output | flow | dvc repro | |\n|---|---|---|---|")
    for path in sorted(flow | alone):
        one, other = flow.get(path, "none")[:12], alone.get(path, "none")[:12]
        print(f"| {path} | {one} | {other} | {'same' if one == other else 'DIFFERENT'} |")
    return 0 if flow == alone else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="tiny")
    sys.exit(main(parser.parse_args().profile))
