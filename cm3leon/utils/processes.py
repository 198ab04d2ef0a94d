"""Names of processes that stay true: a process id is given away again, so a process is named by host, id and start."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil


def identity(pid: int | None = None) -> str:
    """Host, process id and start of a process, by default of this one, joined by colons."""
    pid = os.getpid() if pid is None else pid
    return f"{socket.gethostname()}:{pid}:{_start(pid)}"


def pid_of(identity: str) -> int:
    """The process id in an :func:`identity`."""
    return int(identity.split(":")[-2])


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
