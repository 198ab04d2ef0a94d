"""Where tensors are computed."""

from __future__ import annotations

import os

import torch


def default_device() -> torch.device:
    """This process's GPU (``LOCAL_RANK`` under ``torchrun``) where there is one, else the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
