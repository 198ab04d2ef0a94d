"""The device of this process."""

from __future__ import annotations

import os

import torch


def default_device() -> torch.device:
    """The GPU of this process (``LOCAL_RANK`` under ``torchrun``) if there is one, else the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
