"""A run begins also after DVC was killed while it wrote its own files, and loses nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from cm3leon.utils.errors import UserError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
STAGES = {
    "first": {"cmd": "cp source one", "deps": ["source"], "outs": ["one"]},
    "second": {"cmd": "cp one two", "deps": ["one"], "outs": ["two"]},
}


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A project whose two stages are up to date; the content of its dvc.lock."""
    from flows.stage import run_stage

    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "--quiet"], check=True)
    shutil.copytree(ROOT / ".dvc", ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}, sort_keys=False))
    Path("source").write_text("content")
    for stage in STAGES:
        run_stage(stage, lambda line: None)
    return Path("dvc.lock").read_bytes()


@pytest.mark.parametrize("size", [0, 10, 60, 150, -5])
@pytest.mark.parametrize("copied", [True, False], ids=["copied", "not-copied"])
def test_a_truncated_lock_is_replaced_and_no_command_runs_again(
    finished: bytes, size: int, copied: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.graph import stage_order
    from flows.stage import run_stage

    if copied:
        stage_order()
    Path("dvc.lock").write_bytes(finished[:size])
    assert [stage.name for stage in stage_order()] == list(STAGES)
    assert {run_stage(stage, lambda line: None).state for stage in STAGES} <= {"Skipped", "Cached"}
    assert Path("dvc.lock").read_bytes() == finished
    if size == 0:
        assert "dvc.lock was damaged" in capsys.readouterr().err


def test_a_damaged_lock_of_a_killed_process_is_removed(finished: bytes) -> None:
    from flows.graph import stage_order
    from flows.stage import run_stage

    Path(".dvc/tmp/rwlock").write_text('{"read": {')
    stage_order()
    assert run_stage("first", lambda line: None).state == "Skipped"


def test_a_conflict_that_git_left_in_the_lock_is_the_users_to_resolve(finished: bytes) -> None:
    from flows.graph import stage_order

    conflict = b"<<<<<<< HEAD\n" + finished + b"=======\n" + finished + b">>>>>>> theirs\n"
    Path("dvc.lock").write_bytes(conflict)
    with pytest.raises(UserError, match=r"dvc\.lock has .*conflict.*git checkout --ours"):
        stage_order()
    assert Path("dvc.lock").read_bytes() == conflict
