"""Are the artifacts the same bits? python benchmarks/reproduce.py [--profile tiny] [--against COMMIT]

Two fresh clones in a temporary folder, each with a DVC cache of its own. By default both are of HEAD: one runs the flow, the other
``dvc repro``. With ``--against`` both run ``dvc repro``, one of them at COMMIT: a refactoring must give the same bits.

Every output of every stage is compared by content hash, except ``models/runs``, which names MLflow runs. Where two directories differ,
their files are listed; of safetensors it says whether the tensors are equal, as a renamed tensor changes the file alone. Exit status 1 if
an output differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
FLOW, DVC = ["flows.pipeline", "--no-promote"], ["dvc", "repro"]


def environment_of(project: Path) -> dict[str, str]:
    """Variables for the commands of a clone. Stages call ``cm3leon``, and the installed one belongs to this checkout: it gets its own."""
    command = project / ".cache" / "bin" / "cm3leon"
    command.parent.mkdir(parents=True, exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cm3leon "$@"\n')
    command.chmod(0o755)
    drop = ("MLFLOW_", "PREFECT_", "DVC_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    search = [str(command.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    return environment | {"PYTHONPATH": str(project), "PATH": os.pathsep.join(search)}


def clone(to: Path, commit: str, profile: str, *changes: str) -> dict[str, str]:
    """Clone a commit and write its parameters from the profile with ``key=value`` changes; returns the environment for its commands."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(to)], check=True)
    subprocess.run(["git", "checkout", "--quiet", commit], cwd=to, check=True)
    environment = environment_of(to)
    settings = [argument for change in changes for argument in ("--set", change)]
    for arguments in (["configure", profile, *settings], ["setup"]):
        subprocess.run([sys.executable, "-m", "cm3leon", *arguments], cwd=to, env=environment, check=True)
    return environment


def hashes(project: Path) -> dict[str, str]:
    """Content hash of each output, from ``dvc.lock``; without those that name a run."""
    stages = yaml.safe_load((project / "dvc.lock").read_text())["stages"].values()
    return {out["path"]: out["md5"] for stage in stages for out in stage["outs"] if not out["path"].startswith("models/runs/")}


def differences(one: Path, other: Path) -> list[str]:
    """How the files below two directories differ."""
    found = []
    names = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (one, other)]
    for name in sorted(names[0] | names[1]):
        if name not in names[0] or name not in names[1]:
            found.append(f"{name}: only in the {'second' if name not in names[0] else 'first'}")
        elif (one / name).read_bytes() != (other / name).read_bytes():
            found.append(f"{name}: {_tensors(one / name, other / name) if name.suffix == '.safetensors' else 'differs'}")
    return found


def _tensors(one: Path, other: Path) -> str:
    """Whether two files hold the same tensors in the same order of names, up to the names."""
    first, second = (load_file(path) for path in (one, other))
    changed = sorted(first.keys() ^ second.keys())
    same = all(torch.equal(first[name], second[name]) for name in first.keys() & second.keys())
    moved = [[tensors[name] for name in sorted(tensors.keys() & set(changed))] for tensors in (first, second)]
    same &= len(moved[0]) == len(moved[1]) and all(torch.equal(a, b) for a, b in zip(*moved, strict=True))
    return "the same tensors" + (f", renamed: {', '.join(changed)}" if changed else "") if same else "other tensors"


def main(profile: str, against: str | None) -> int:
    """Run both and print the comparison."""
    runs = {"dvc repro": ("HEAD", DVC), against: (against, DVC)} if against else {"flow": ("HEAD", FLOW), "dvc repro": ("HEAD", DVC)}
    projects: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (commit, command)) in enumerate(runs.items()):
            project = projects[str(name)] = Path(folder) / str(number)
            environment = clone(project, str(commit), profile)
            subprocess.run([sys.executable, "-m", *command], cwd=project, env=environment, check=True)
        (first, one), (second, other) = projects.items()
        left, right = hashes(one), hashes(other)
        print(f"| output | {first} | {second} | |\n|---|---|---|---|")
        for path in sorted(left | right):
            a, b = left.get(path, "none"), right.get(path, "none")
            note = "same" if a == b else "; ".join(differences(one / path, other / path)) or "DIFFERENT"
            print(f"| {path} | {a[:12]} | {b[:12]} | {note} |")
    return 0 if left == right else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--against", metavar="COMMIT", help="compare HEAD with this commit instead of the flow with dvc repro")
    options = parser.parse_args()
    sys.exit(main(options.profile, options.against))
