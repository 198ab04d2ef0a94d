"""What the processor is."""

from pathlib import Path

import pytest
import torch

from cm3leon.utils import device


@pytest.mark.parametrize(("vendor", "slow"), [("GenuineIntel", False), ("AuthenticAMD", True), (None, False)])
@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
@pytest.mark.parametrize("libraries", [True, False])
def test_prefers_onednn_on_processors_with_avx_512_that_are_not_intel_s(tmp_path: Path, monkeypatch, vendor, slow, capability, libraries):
    cpuinfo = tmp_path / "cpuinfo"
    if vendor:
        cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: A processor\n")
    monkeypatch.setattr(device, "CPUINFO", cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: libraries)
    assert device.prefers_onednn.__wrapped__() == (slow and libraries and capability == "AVX512")
