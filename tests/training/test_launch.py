"""How a training stage starts its processes."""

import os
import signal
import subprocess
import sys
import time

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
    monkeypatch.setattr(os, "execve", lambda path, command, environment: commands.append(command))
    return commands


def test_one_process_is_not_replaced(started):
    launch.replace_by_torchrun(["pretrain"], LaunchConfig(processes=1))
    assert not started


def test_there_is_a_process_for_each_gpu(started, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    launch.replace_by_torchrun(["sft"], LaunchConfig())
    assert [word for word in started[0] if word.startswith("--nproc")] == ["--nproc-per-node=4"]
    assert started[0][-3:] == ["-m", "cm3leon", "sft"]


def test_more_processes_than_gpus_are_refused(started, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match=r"launch\.processes is 3, .* this machine has 2"):
        launch.replace_by_torchrun(["evaluate"], LaunchConfig(processes=3))
    launch.replace_by_torchrun(["evaluate"], LaunchConfig(processes=2))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    launch.replace_by_torchrun(["evaluate"], LaunchConfig(processes=3))
    assert [word for command in started for word in command if word.startswith("--nproc")] == ["--nproc-per-node=2", "--nproc-per-node=3"]


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


def started_by_torchrun(directory, code):
    """``cm3leon pretrain`` in two processes, in which a program of this code takes the place of ``cm3leon``."""
    (directory / "program.py").write_text(f"import os, signal, sys, time\n{code}\n")
    command = launch.torchrun_command(["pretrain"], 2, "")
    assert command[0] == sys.executable and command[-3:] == ["-m", "cm3leon", "pretrain"]
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "PYTHONSAFEPATH")}
    return subprocess.Popen(
        [*command[:-2], "program", "pretrain"],
        cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_torchrun_starts_the_stage_in_every_process(tmp_path):
    line = r"{sys.argv[1:]} {os.environ['RANK']} of {os.environ['WORLD_SIZE']}\n"  # one write: two unbuffered ones would interleave
    process = started_by_torchrun(tmp_path, f'sys.stdout.write(f"{line}")')
    output, errors = process.communicate()
    assert sorted(output.split("\n")) == ["", "['pretrain'] 0 of 2", "['pretrain'] 1 of 2"], errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "status", "last"),
    [
        ("sys.stderr.write('error: no image tokenizer here\\n'); sys.exit(2)", 2, "error: no image tokenizer here"),
        ("raise ValueError('wrong')", 1, "ended with status 1"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "ended with SIGKILL"),
    ],
)
def test_the_error_of_the_process_that_failed_comes_last(code, status, last, tmp_path):
    """The second process fails, the first waits for it: it is ended, and says nothing."""
    process = started_by_torchrun(tmp_path, f"if os.environ['RANK'] == '0': time.sleep(60)\n{code}")
    _, errors = process.communicate()
    assert process.returncode == status and last in errors.splitlines()[-1]
    assert "ValueError: wrong" in errors or "Traceback" not in errors
    assert last.startswith("error") or "process 1 (id " in errors


@pytest.mark.slow
def test_a_process_that_waits_for_one_that_failed_leaves_it_the_last_word(tmp_path):
    code = "with world() as processes:\n    if processes.rank == 0:\n        processes.wait()\n    raise ValueError('wrong')"
    process = started_by_torchrun(tmp_path, f"from cm3leon.utils.world import world\n{code}")
    _, errors = process.communicate()
    assert errors.count("Traceback") == 1 and "ValueError: wrong" in errors
    assert "process 1 (id " in errors.splitlines()[-1] and process.returncode == 1


@pytest.mark.slow
def test_processes_wait_for_one_that_takes_longer_than_torch_allows(tmp_path):
    code = """
import pathlib
from datetime import timedelta
import torch
import torch.distributed.distributed_c10d as c10d
from cm3leon.utils.world import world

c10d.default_pg_timeout = timedelta(seconds=2)
pathlib.Path(os.environ["RANK"]).touch()
while not (pathlib.Path("0").exists() and pathlib.Path("1").exists()):
    time.sleep(0.01)
with world() as processes:
    time.sleep(2.5 * processes.rank)
    found = processes.gather(processes.rank)
    time.sleep(2.5 * (1 - processes.rank))
    rows = processes.concatenate(torch.full((processes.rank + 1,), processes.rank))
    sys.stdout.write(f"{found} {rows.tolist()}\\n")
"""
    output, errors = started_by_torchrun(tmp_path, code).communicate()
    assert output == "[0, 1] [0, 1, 1]\n" * 2, errors


@pytest.mark.slow
def test_ctrl_c_ends_a_process_that_waits_for_one_that_has_ended_by_it_before_they_were_connected(tmp_path):
    code = """
signal.signal(signal.SIGINT, signal.default_int_handler)
from cm3leon.utils.world import world

os.write(1, b"up\\n")
time.sleep(60 * int(os.environ["RANK"]))
with world():
    pass
"""
    process = started_by_torchrun(tmp_path, code)
    assert [process.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
    time.sleep(0.5)  # the first is waiting
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)


@pytest.mark.slow
def test_a_sigterm_reaches_the_processes(tmp_path):
    code = "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'told\\n'), sys.exit(1)))\nos.write(1, b'up\\n')\ntime.sleep(60)"
    process = started_by_torchrun(tmp_path, code)
    assert [process.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
    process.terminate()
    output, errors = process.communicate()
    assert (output, process.returncode, errors.splitlines()[-1]) == ("told\ntold\n", 1, "ended by SIGTERM")
