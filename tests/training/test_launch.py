"""How a training stage starts its processes."""

import os
import subprocess
import sys

import pytest

from cm3leon.config.schema import LaunchConfig
from cm3leon.training import launch
from cm3leon.utils.errors import UserError


@pytest.fixture
def started(monkeypatch):
    """Command lines that replace the process."""
    commands: list[list[str]] = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(os, "execv", lambda path, command: commands.append(command))
    return commands


def test_one_process_is_not_replaced(started):
    launch.replace_by_torchrun(["pretrain"], LaunchConfig(processes=1))
    assert not started


def test_there_is_a_process_for_each_gpu(started, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    launch.replace_by_torchrun(["sft"], LaunchConfig())
    assert [word for word in started[0] if word.startswith("--nproc")] == ["--nproc-per-node=4"]
    assert started[0][-3:] == ["-m", "cm3leon", "sft"]


def test_processes_of_torchrun_are_not_replaced(started, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch.replace_by_torchrun(["pretrain"], LaunchConfig(processes=2))
    assert not started


def test_torchrun_gets_the_arguments_with_variables_of_the_environment(started, monkeypatch):
    monkeypatch.setenv("HEAD", "node0")
    launch.replace_by_torchrun(["pretrain"], LaunchConfig(processes=1, torchrun="--nnodes 2 --rdzv-endpoint $HEAD:29500"))
    assert started[0][3:6] == ["--nnodes", "2", "--rdzv-endpoint"] and started[0][6] == "node0:29500"
    assert "--standalone" not in started[0]
    monkeypatch.delenv("HEAD")
    with pytest.raises(UserError, match=r"a variable of \$HEAD:29500 is not set"):
        launch.replace_by_torchrun(["pretrain"], LaunchConfig(torchrun="--rdzv-endpoint $HEAD:29500"))


@pytest.mark.slow
def test_torchrun_starts_the_stage_in_every_process(tmp_path):
    """With a package of the same name that prints instead of training."""
    (tmp_path / "cm3leon").mkdir()
    (tmp_path / "cm3leon/__init__.py").write_text("")
    line = r"{sys.argv[1:]} {os.environ['RANK']} of {os.environ['WORLD_SIZE']}\n"  # one write: two unbuffered ones would interleave
    (tmp_path / "cm3leon/__main__.py").write_text(f'import os, sys; sys.stdout.write(f"{line}")')
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "PYTHONPATH", "PYTHONSAFEPATH")}
    command = launch.torchrun_command(["pretrain"], 2, "")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert sorted(done.stdout.split("\n")) == ["", "['pretrain'] 0 of 2", "['pretrain'] 1 of 2"], done.stderr
    assert command[0] == sys.executable
