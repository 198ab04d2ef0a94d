"""Devices by the names their drivers give them, and FLOPs against PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
from tests_support import decoder_spec
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cm3leon.models.decoder import Decoder
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.training.hardware import DEVICES, flops_per_token, peak_flops


@pytest.mark.parametrize(("name", "flops"), [
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA A100-SXM4-40GB", 312e12),
    ("NVIDIA A100 80GB PCIe", 312e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA GH200 480GB", 989e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA A10", 125e12),
    ("NVIDIA A10G", 70e12),
    ("NVIDIA GeForce RTX 4090", 165e12),
    ("AMD Instinct MI300X", 1307e12),
])  # fmt: skip
def test_devices_by_their_drivers_names(name: str, flops: float) -> None:
    assert peak_flops(name) == flops


@pytest.mark.parametrize("name", [
    "", "Tesla V100-SXM2-32GB", "NVIDIA H20", "NVIDIA L40", "NVIDIA RTX A1000", "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
    "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
])  # fmt: skip
def test_names_that_only_look_like_a_known_one_are_unknown(name: str) -> None:
    assert peak_flops(name) is None


def test_names_are_unique() -> None:
    assert len({device.name for device in DEVICES}) == len(DEVICES)


@pytest.mark.parametrize("recompute", [False, True])
def test_flops_are_those_that_pytorch_counts(recompute: bool) -> None:
    """PyTorch counts attention's products whole, ``12 * layers * width * context``; here the causal half of them. Nothing else differs.

    With activation checkpointing it also counts the blocks' second forward pass, which ends before the last projection and is no work of
    the model's. In bfloat16, as the counter does not know the in-place product that the loss adds float32 gradients with.
    """
    layers, width, context, rows = 2, 64, 32, 3
    vocabulary = Vocabulary(40, 20, 4, 9)
    model = Decoder(decoder_spec(layers, width, 4, context), vocabulary)
    model.recompute = recompute
    tokens = torch.randint(vocabulary.size, (rows, context))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total, _ = model.losses(tokens, torch.ones(tokens.shape), torch.zeros_like(tokens))
        total.backward()
    causal_half = 6 * layers * width * context
    again = (2 * 8 * layers * width**2 + 4 * layers * width * context) if recompute else 0
    no_target = 6 * rows * vocabulary.size * width  # the last token of a row predicts nothing
    counted = rows * context * (flops_per_token(model.spec, vocabulary.size, context) + causal_half + again) - no_target
    assert counter.get_total_flops() == counted
