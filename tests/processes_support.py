"""Functions in processes of their own, forked from one that has imported the trainers: such a process starts in no time."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cm3leon.services.local import free_port

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "cm3leon.training.checkpoint",
        "cm3leon.training.clip",
        "cm3leon.training.super_resolution",
        "cm3leon.training.trainer",
        "cm3leon.training.vqgan",
        "torch._dynamo",
        "torch.distributed.fsdp",
    ]
)


class Job:
    """A function in one process, or in several that are one run of training, with the variables that torchrun gives them.

    Attributes:
        output: file of what they print.
    """

    def __init__(self, function: Callable[..., None], *arguments: Any, output: Path, count: int = 1) -> None:
        self.output = output
        output.write_bytes(b"")
        variables = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(0))}
        own = [variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        self.processes = [FORKS.Process(target=_run, args=(function, arguments, output, found), daemon=True) for found in own]
        for process in self.processes:
            process.start()

    @property
    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def send_signal(self, number: int) -> None:
        """To each process, as torchrun does."""
        for process in self.processes:
            assert process.pid is not None
            os.kill(process.pid, number)

    def wait(self, seconds: float) -> tuple[int, str]:
        """Exit status, and output. Of several processes the status is that of the first one that failed; one that runs longer is killed."""
        for process in self.processes:
            process.join(seconds)
            process.kill()
            process.join()
        statuses = [process.exitcode for process in self.processes]
        return next((status for status in statuses if status), 0), self.output.read_text()


def _run(function: Callable[..., None], arguments: tuple[Any, ...], output: Path, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    with output.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    function(*arguments)


def run_stages(directory: Path, ports: dict[str, int]) -> None:
    """Run stages in a directory with a ``params.yaml``, one after another in each process, without MLflow.

    A stage that runs in one process is the first one's; the others wait for it where the next stage connects them.

    Args:
        ports: the stages, and by which port the processes connect in each; that of one stage may still be open when the next begins.
    """
    import importlib
    from contextlib import nullcontext
    from unittest.mock import patch

    import torch

    from cm3leon.config.loading import load_config
    from cm3leon.stages.common import launching
    from cm3leon.tracking import runs

    os.chdir(directory)
    torch.set_num_threads(1)
    config = load_config()
    with patch.object(runs, "stage_run", lambda stage, config: nullcontext(runs.Run())):
        for stage, port in ports.items():
            os.environ["MASTER_PORT"] = str(port)
            if os.environ["RANK"] == "0" or launching(stage, config):
                importlib.import_module(f"cm3leon.stages.{stage}").run(config)
