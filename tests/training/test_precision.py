"""The precision of matrix products: as configured, or by the device's instructions."""

from __future__ import annotations

import pytest
import torch

from cm3leon.config.schema import PretrainConfig
from cm3leon.training.precision import autocast_dtype


def test_auto_is_bfloat16_only_on_devices_with_native_support(monkeypatch: pytest.MonkeyPatch) -> None:
    config, cpu = PretrainConfig(precision="auto"), torch.device("cpu")
    for capability, expected in (("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx512_f", torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capability: {found: True}, raising=False)
        assert autocast_dtype(config, cpu) == expected
        assert autocast_dtype(PretrainConfig(precision="fp32"), cpu) == torch.float32
        assert autocast_dtype(PretrainConfig(precision="bf16"), cpu) == torch.bfloat16
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in torch before 2.12
    assert autocast_dtype(config, cpu) == torch.float32
