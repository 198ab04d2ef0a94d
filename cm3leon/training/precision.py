"""The precision of a run's matrix products: float32, or bfloat16 under autocast. Parameters and optimizer states stay float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch


class HasPrecision(Protocol):
    """A section of the parameters that says in which precision it is computed."""

    @property
    def precision(self) -> str: ...


def has_native_bf16(device: torch.device) -> bool:
    """True for a GPU with bfloat16 instructions. Where PyTorch emulates them in float32, bfloat16 is slower than float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast_dtype(config: HasPrecision, device: torch.device) -> torch.dtype:
    """The dtype of matrix products under ``config.precision``; ``auto`` is bfloat16 on GPUs with native support for it.

    On CPUs it is float32 whatever their instructions: a small decoder that computes in bfloat16 learns some things late or never, so
    that a run would end with another quality on another processor (docs/log.md, "bfloat16 hid the relations").
    """
    bf16 = has_native_bf16(device) if config.precision == "auto" else config.precision == "bf16"
    return torch.bfloat16 if bf16 else torch.float32


def autocast(config: HasPrecision, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to :func:`autocast_dtype`; no autocast at all for float32."""
    dtype = autocast_dtype(config, device)
    return torch.autocast(device.type, dtype=dtype) if dtype == torch.bfloat16 else nullcontext()
