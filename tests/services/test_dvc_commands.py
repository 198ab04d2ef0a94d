"""Push, pull and garbage collection with DVC itself, over a toy graph."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cm3leon.services.dvc_commands import DvcError, find_remote, pull, push, remove_unused
from cm3leon.tracking.lineage import DVC_LOCK

ROOT = Path(__file__).parents[2]
TOY = {
    "first": {"cmd": "mkdir -p out/first && cp in.txt out/first/a", "deps": ["in.txt"], "outs": ["out/first"]},
    "second": {"cmd": "cat out/first/a more.txt > out/second", "deps": ["out/first", "more.txt"], "outs": ["out/second"]},
}


def run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dvc(*arguments: str) -> str:
    return run(sys.executable, "-m", "dvc", *arguments)


def commit(message: str) -> None:
    run("git", "add", "--all")
    run("git", "-c", "user.name=me", "-c", "user.email=me@here", "commit", "--quiet", "--no-verify", "-m", message)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of two stages that have run, its lock committed."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    run("git", "init", "--quiet")
    shutil.copytree(ROOT / ".dvc", ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    Path(".gitignore").write_text("/out\n")
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": TOY}, sort_keys=False))
    Path("in.txt").write_text("one\n")
    Path("more.txt").write_text("more\n")
    dvc("repro", "--quiet")
    commit("one")
    return project


@pytest.fixture
def remote(toy: Path, tmp_path: Path) -> Path:
    """The toy's default remote: a directory."""
    place = tmp_path / "remote"
    dvc("remote", "add", "--default", "storage", str(place))
    commit("remote")
    return place


def clone(toy: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("git", "clone", "--quiet", str(toy), str(to))
    monkeypatch.chdir(to)


def ignore(line: str) -> None:
    """DVC's lines are not of interest."""


def test_without_a_remote_the_error_says_how_to_add_one(toy: Path) -> None:
    with pytest.raises(DvcError, match=r"dvc remote add --default storage PLACE, .* a directory .*, ssh://.* or s3://"):
        find_remote()
    with pytest.raises(DvcError, match="no remote elsewhere; configured: none"):
        find_remote("elsewhere")


def test_a_fresh_clone_pulls_what_was_pushed(toy: Path, remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    push(find_remote(), lines.append)
    assert "3 files pushed" in lines

    clone(toy, tmp_path / "clone", monkeypatch)
    assert not Path("out").exists()
    pull(find_remote("storage"), ignore)
    assert Path("out/second").read_text() == "one\nmore\n"

    Path("out/second").write_text("mine")  # kept nowhere else
    with pytest.raises(DvcError, match="unsaved files"):
        pull(find_remote(), ignore)
    assert Path("out/second").read_text() == "mine"
    pull(find_remote(), ignore, force=True)
    assert Path("out/second").read_text() == "one\nmore\n"


def test_a_push_of_lost_objects_is_an_error(toy: Path, remote: Path) -> None:
    """``dvc push`` itself warns, says that everything is up to date, and ends with status 0."""
    shutil.rmtree(".dvc/cache/files")
    with pytest.raises(DvcError, match=r"[23] objects or more that dvc\.lock names are neither in DVC's cache nor on storage"):
        push(find_remote(), ignore)


def test_without_a_lock_and_with_an_unreadable_remote_the_error_says_what_to_do(toy: Path, remote: Path) -> None:
    remote.write_text("a file")
    with pytest.raises(DvcError, match="dvc push failed"):
        push(find_remote(), ignore)
    DVC_LOCK.unlink()
    for command in (push, pull):
        with pytest.raises(DvcError, match="cm3leon data pull --version @champion"):
            command(find_remote(), ignore)


def test_continuous_integration_runs_what_changed_and_pulls_only_what_that_needs(
    toy: Path, remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documented ``dvc repro --pull --allow-missing``, in a clone without data."""
    push(find_remote(), ignore)
    clone(toy, tmp_path / "clone", monkeypatch)
    shown = dvc("repro", "--pull", "--allow-missing")
    assert "didn't change" in shown and not Path("out").exists()

    Path("more.txt").write_text("other\n")
    shown = dvc("repro", "--pull", "--allow-missing")
    assert "Running stage 'second'" in shown and "Running stage 'first'" not in shown
    assert Path("out/second").read_text() == "one\nother\n"


# --- S3 --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The address of an S3 server with an empty bucket ``models``."""
    import boto3
    from moto.server import ThreadedMotoServer

    for name, value in {"ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        boto3.client("s3", endpoint_url=address).create_bucket(Bucket="models")
        yield address
    finally:
        server.stop()


@pytest.mark.slow
def test_a_fresh_clone_pulls_from_s3(toy: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    dvc("remote", "add", "--default", "cloud", "s3://models/cm3leon")
    dvc("remote", "modify", "cloud", "endpointurl", bucket)
    commit("remote")
    push(find_remote(), ignore)
    stored = boto3.client("s3", endpoint_url=bucket).list_objects_v2(Bucket="models")["Contents"]
    assert len(stored) == 3 and all(item["Key"].startswith("cm3leon/") for item in stored)

    clone(toy, tmp_path / "clone", monkeypatch)
    pull(find_remote(), ignore)
    assert Path("out/second").read_text() == "one\nmore\n"


# --- garbage ---------------------------------------------------------------------------------------------------------


def cached() -> set[str]:
    """The objects of the cache, without those of directories."""
    return {path.read_text() for path in Path(".dvc/cache/files").rglob("*") if path.is_file() and path.suffix != ".dir"}


@pytest.mark.slow
def test_objects_of_the_working_tree_of_a_commit_and_of_a_given_lock_stay(toy: Path) -> None:
    locks = {}
    for text in ("two", "three", "four"):
        Path("in.txt").write_text(f"{text}\n")
        dvc("repro", "--quiet")
        locks[text] = DVC_LOCK.read_text()
    everything = cached()
    assert len(everything) == 8

    size = remove_unused([locks["two"]], dry_run=True)
    assert cached() == everything
    assert remove_unused([locks["two"]], dry_run=False) == size
    # A cached directory is listed in an object of its own: 75 bytes or so.
    assert size > len("three\n" + "three\nmore\n")
    assert cached() == {text for name in ("one", "two", "four") for text in (f"{name}\n", f"{name}\nmore\n")}
    assert remove_unused([], dry_run=True) > 0
    assert remove_unused([locks["two"]], dry_run=False) == 0


def test_garbage_is_collected_outside_of_git(toy: Path) -> None:
    shutil.rmtree(".git")
    Path(".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    first = DVC_LOCK.read_text()
    Path("in.txt").write_text("two\n")
    dvc("repro", "--quiet")
    assert remove_unused([first], dry_run=False) == 0
    assert remove_unused([], dry_run=False) > 0
    assert cached() == {"two\n", "two\nmore\n"}


@pytest.mark.slow
def test_objects_of_a_given_lock_stay_in_a_project_with_an_odd_name(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = toy.with_name("a #1, b's $x %20")
    toy.rename(odd)
    monkeypatch.chdir(odd)
    locks = []
    for text in ("two", "three"):
        Path("in.txt").write_text(f"{text}\n")
        dvc("repro", "--quiet")
        locks.append(DVC_LOCK.read_text())
    everything = cached()
    assert remove_unused(locks[:1], dry_run=False) == 0
    assert cached() == everything


def test_a_cache_in_another_place_is_found(toy: Path, tmp_path: Path) -> None:
    dvc("cache", "dir", "--local", os.path.relpath(tmp_path / "elsewhere", ".dvc"))
    for text in ("two", "three"):
        Path("in.txt").write_text(f"{text}\n")
        dvc("repro", "--quiet")
    assert remove_unused([], dry_run=False) > 0
