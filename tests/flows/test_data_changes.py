"""``cm3leon data changed``: DVC is asked whether the source has moved, and a real server is told of each content once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from flows_support import ROOT, events

from cm3leon.services.changes import EVENT, tell_changed
from cm3leon.services.exclusive import BusyError, alone_in_directory
from cm3leon.services.worktree import WORKTREE, prepare
from cm3leon.utils.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str) -> Path:
    """The source of a project, the working directory, in which ``ingest`` has run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    subprocess.run(["git", "init", "--quiet"], check=True)
    shutil.copytree(ROOT / ".dvc", ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    shutil.copy(ROOT / "params.yaml", ".")
    ingest = {"cmd": "ls data/source > raw.txt", "deps": ["${ingest.path}"], "outs": ["raw.txt"]}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"ingest": ingest}}))
    source = Path("data/source")
    (source / "images").mkdir(parents=True)
    (source / "manifest.csv").write_text("image,caption\n")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], check=True)
    return source


def test_each_content_of_the_source_is_told_once(source: Path, prefect_server: str) -> None:
    assert tell_changed() == "data/source is as dvc.lock names it; no event sent (--force sends one)"
    (source / "images/1.png").write_bytes(b"an image")
    sent = f"data/source is modified: event cm3leon.data.changed sent to {prefect_server}"
    assert tell_changed(source / "images") == sent  # a hook names what it was called for
    assert tell_changed() == "data/source is modified, which an event has told already; no event sent (--force sends one)"
    (source / "images/1.png").write_bytes(b"another image")
    assert tell_changed() == sent
    assert tell_changed(force=True) == sent
    found = events(prefect_server, EVENT, "cm3leon.data.data/source", count=3)
    assert [event["payload"] for event in found] == [{"path": "data/source", "change": "modified", "project": str(Path.cwd())}] * 3


def run_in_worktree() -> None:
    """What a run of a deployment does with the last commit."""
    tree = prepare(Path.cwd())
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], cwd=tree, check=True)


def test_that_data_were_taken_back_is_told(source: Path, prefect_server: str) -> None:
    Path(".gitignore").write_text("/data/\n/.cache/\n/raw.txt\n")
    subprocess.run(["git", "add", "--all", "--", ":!dvc.lock"], check=True)
    subprocess.run(["git", "-c", "user.name=me", "-c", "user.email=me@here", "commit", "--quiet", "-m", "project"], check=True)
    (source / "images/1.png").write_bytes(b"an image")
    tell_changed()
    run_in_worktree()  # trains on it
    (source / "images/1.png").unlink()
    assert tell_changed() == f"data/source is unchanged: event cm3leon.data.changed sent to {prefect_server}"
    assert tell_changed() == "data/source is as dvc.lock names it; no event sent (--force sends one)"
    run_in_worktree()
    (source / "manifest.csv").touch()
    assert tell_changed() == "data/source is as dvc.lock names it; no event sent (--force sends one)"


def test_files_that_are_only_written_again_are_not_told(source: Path) -> None:
    (source / "images/1.png").write_bytes(b"an image")
    tell_changed()
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], check=True)
    for file in (source / "images/1.png", source / "manifest.csv"):
        file.touch()
    assert tell_changed() == "data/source is as dvc.lock names it; no event sent (--force sends one)"


def test_what_cannot_start_a_run_is_an_error(source: Path, prefect_server: str) -> None:
    with pytest.raises(UserError, match=r"no stage in dvc\.yaml depends on docs; the source is data/source \(ingest\.path"):
        tell_changed(Path("docs"))
    WORKTREE.mkdir(parents=True)
    with alone_in_directory(WORKTREE), pytest.raises(BusyError, match="another run works"):  # beside which the new one would be cancelled
        tell_changed(force=True)
    shutil.move(".git", "no-git")  # then a run works in the project itself
    with alone_in_directory(), pytest.raises(BusyError, match="another run works"):
        tell_changed(force=True)
    shutil.move("no-git", ".git")
    shutil.rmtree(source)
    with pytest.raises(UserError, match="data/source, on which a stage depends, does not exist"):
        tell_changed(force=True)
    assert not Path(".cache/data-changed.json").exists()
