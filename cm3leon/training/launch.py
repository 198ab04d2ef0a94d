"""Start a stage's processes: one for each GPU of the machine, and on several machines as ``torchrun`` is told."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from cm3leon.config.schema import LaunchConfig
from cm3leon.utils.errors import UserError

SHUTDOWN_SECONDS = 600
"""From the SIGTERM that torchrun passes on to SIGKILL: a step and a checkpoint take less."""


def replace_by_torchrun(command: Sequence[str], config: LaunchConfig) -> None:
    """Replace this process by ``torchrun``, which runs a command of ``cm3leon`` in several processes.

    Returns where one process is enough, and in the processes that ``torchrun`` has started.

    Raises:
        UserError: if ``launch.torchrun`` names a variable that is not set, or there are fewer GPUs than processes.
    """
    if "WORLD_SIZE" in os.environ:
        return
    processes = process_count(config)
    if processes == 1 and not config.torchrun:
        return
    os.execve(sys.executable, torchrun_command(command, processes, config.torchrun), torchrun_environment(processes))


def torchrun_environment(processes: int) -> dict[str, str]:
    """The environment of :func:`torchrun_command`, in which ``processes`` processes share the cores."""
    from cm3leon.utils.device import cores

    return {"OMP_NUM_THREADS": str(max(1, cores() // processes)), **os.environ}


def process_count(config: LaunchConfig) -> int:
    """The number of a stage's processes on this machine.

    Raises:
        UserError: if there are GPUs, and fewer than ``launch.processes``.
    """
    if config.processes == 1:
        return 1
    import torch

    gpus = torch.cuda.device_count()
    if config.processes == "auto":
        return max(1, gpus)
    if 0 < gpus < config.processes:
        raise UserError(f"launch.processes is {config.processes}, and each needs a GPU of its own: this machine has {gpus}; set it to auto")
    return config.processes


def torchrun_command(command: Sequence[str], processes: int, arguments: str) -> list[str]:
    """The command line that runs a command of ``cm3leon`` in ``processes`` processes on this machine.

    Args:
        arguments: of ``torchrun`` for several machines, in which ``$NAME`` is replaced by the variable of the environment.
    """
    where = shlex.split(os.path.expandvars(arguments)) or ["--standalone"]
    if unset := [word for word in where if "$" in word]:
        raise UserError(f"launch.torchrun: a variable of {' '.join(unset)} is not set in the environment")
    options = [*where, f"--nproc-per-node={processes}", f"--shutdown-timeout={SHUTDOWN_SECONDS}"]
    return [sys.executable, "-m", "cm3leon.training.torchrun", *options, "-m", "cm3leon", *command]
