"""Free memory, of a GPU or of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from cm3leon.utils.device import local_processes


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device; on a CPU its share, without swapping and within the container's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # and what PyTorch keeps for itself
    return free_host_memory() // local_processes()


def free_host_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that can be allocated: Linux's estimate, and at most what a container's limit (cgroup v2) leaves.

    Where neither is known, all memory of the machine.

    Args:
        root: in which ``proc`` and ``sys`` are mounted.
    """
    information, group = root / "proc/meminfo", root / "sys/fs/cgroup"
    if information.is_file():
        free = _table(information)["MemAvailable:"] * 1024
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = group / "memory.max"
    if not limit.is_file() or (most := limit.read_text().strip()) == "max":
        return free
    # Pages of files that are not in use are given back before the limit is reached.
    used = int((group / "memory.current").read_text()) - _table(group / "memory.stat")["inactive_file"]
    return max(0, min(free, int(most) - used))


def _table(file: Path) -> dict[str, int]:
    """Names and numbers of a file with one of each a line."""
    return {name: int(value) for name, value, *_ in map(str.split, file.read_text().splitlines())}
