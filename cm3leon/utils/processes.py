"""Processes: names that stay true, as a process id is given away again, and the end of a process with all that it started."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import psutil

STOP_SECONDS = 25.0
"""From SIGTERM to SIGKILL; Prefect sends a canceled flow SIGKILL 30 s after SIGTERM."""


def identity(pid: int | None = None) -> str:
    """Host, process id and start of a process, by default of this one, joined by colons."""
    pid = os.getpid() if pid is None else pid
    return f"{socket.gethostname()}:{pid}:{_start(pid)}"


def pid_of(identity: str) -> int:
    """The process id in an :func:`identity`."""
    return int(identity.split(":")[-2])


def is_here(identity: str) -> bool:
    """Whether an :func:`identity` is of this host."""
    return identity.rsplit(":", 2)[0] == socket.gethostname()


def has_ended(identity: str) -> bool:
    """Whether a process of this host has ended; False for processes of other hosts, and for texts that are no :func:`identity`."""
    rest, _, start = identity.rpartition(":")
    host, _, pid = rest.rpartition(":")
    return host == socket.gethostname() and pid.isdigit() and _start(int(pid)) != start


def _start(pid: int) -> str | None:
    """Start time of a process, on Linux in clock ticks since boot; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]  # state (Z: a zombie) and starttime of proc_pid_stat(5)
    except OSError:
        pass
    try:
        return str(psutil.Process(pid).create_time())  # moves with the clock on Linux, so only for systems without /proc
    except psutil.NoSuchProcess:
        return None


def stop_tree(pid: int, seconds: float = STOP_SECONDS) -> None:
    """Send SIGTERM to a process and all its descendants, and SIGKILL to those that are alive after ``seconds``."""
    try:
        parent = psutil.Process(pid)
        processes = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
