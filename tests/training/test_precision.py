"""The precision of matrix products: as configured, or by the device."""

from __future__ import annotations

import pytest
import torch

from cm3leon.config.schema import PretrainConfig, SFTConfig
from cm3leon.training.precision import autocast_dtype


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16", "avx512_f"])
def test_auto_is_float32_on_every_processor(monkeypatch: pytest.MonkeyPatch, instructions: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: True}, raising=False)
    for precision, expected in (("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert autocast_dtype(PretrainConfig(precision=precision), torch.device("cpu")) == expected


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bfloat16_on_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    expected = torch.bfloat16 if native else torch.float32
    assert autocast_dtype(PretrainConfig(precision="auto"), torch.device("cuda")) == expected


def test_the_default_profile_has_one_precision_on_every_machine() -> None:
    assert {PretrainConfig().precision, SFTConfig().precision} == {"fp32"}
