"""A training step that does not fit its GPU is refused before training starts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cm3leon.utils.errors import UserError

USABLE = 0.9
"""Share of a device's memory that a step may fill; the rest is for CUDA, NCCL, workspaces and the allocator's fragmentation."""


def refuse_too_large(stage: str, device: torch.device, needed: Callable[[], float], change: Callable[[float], str]) -> None:
    """Refuse a stage whose step does not fit the GPU; on a CPU nothing is checked.

    Args:
        needed: estimates the bytes of a step.
        change: what to do about it, given the bytes that are usable.

    Raises:
        UserError: with the memory needed and present, and the change.
    """
    if device.type != "cuda":
        return
    memory, bytes_needed = torch.cuda.get_device_properties(device).total_memory, needed()
    if bytes_needed > USABLE * memory:
        sizes = f"{bytes_needed / 1e9:.1f} GB on each GPU, of whose {memory / 1e9:.1f} GB {USABLE:.0%} are usable"
        raise UserError(f"{stage} needs about {sizes}; {change(USABLE * memory)}")
