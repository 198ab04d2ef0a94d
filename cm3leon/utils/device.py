"""The device and the cores of this process."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
"""What Linux says of the processor."""


def default_device() -> torch.device:
    """The GPU of this process (``LOCAL_RANK`` under ``torchrun``) if there is one, else the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")


def local_processes() -> int:
    """Processes of ``torchrun`` on this machine, which share its cores and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has no affinity


def copied_to(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The value on a device; the copy to a GPU is made while this process goes on, which it does only from pinned memory."""
    pinned = value.pin_memory() if device.type == "cuda" else value
    return pinned.to(device, non_blocking=True)


@functools.cache
def prefers_onednn() -> bool:
    """Whether oneDNN is at hand and twice as fast as MKL, which makes no use of AVX-512 on processors that are not Intel's."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not (both and torch.backends.cpu.get_cpu_capability().startswith("AVX512") and CPUINFO.is_file()):
        return False
    return not re.search(r"^vendor_id\s*:\s*GenuineIntel$", CPUINFO.read_text(), re.MULTILINE)
