"""Devices by the names that drivers report, and FLOPs per token against PyTorch's counter."""

from __future__ import annotations

import pytest
import torch
from tests_support import decoder_spec
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cm3leon.data.batches import Batch
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
def test_devices_are_known_by_their_drivers_names(name: str, flops: float) -> None:
    assert peak_flops(name) == flops


@pytest.mark.parametrize("name", [
    "", "Tesla V100-SXM2-32GB", "NVIDIA H20", "NVIDIA L40", "NVIDIA RTX A1000", "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
    "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
])  # fmt: skip
def test_names_that_resemble_a_known_one_are_unknown(name: str) -> None:
    assert peak_flops(name) is None


def test_names_are_unique() -> None:
    assert len({device.name for device in DEVICES}) == len(DEVICES)


@pytest.mark.parametrize("recompute", [False, True])
def test_flops_are_those_that_pytorch_counts(recompute: bool) -> None:
    """PyTorch counts attention over the whole context, ``12 * layers * width * context``, our formula over the causal half of it.

    With activation checkpointing PyTorch also counts the blocks' second forward pass, which ends before the last projection; the formula
    leaves it out. The test runs in bfloat16, because the counter does not know ``addmm_``, which accumulates float32 gradients in the loss.
    """
    layers, width, context, rows = 2, 64, 32, 3
    vocabulary = Vocabulary(40, 20, 4, 9)
    model = Decoder(decoder_spec(layers, width, 4, context), vocabulary)
    model.recompute = recompute
    tokens = torch.randint(vocabulary.size, (rows, context))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total, _ = model.losses(Batch.of_tokens(tokens))
        total.backward()
    causal_half = 6 * layers * width * context
    recomputed = (2 * 8 * layers * width**2 + 4 * layers * width * context) if recompute else 0
    no_target = 6 * rows * vocabulary.size * width  # the last token of a row predicts nothing
    counted = rows * context * (flops_per_token(model.spec, vocabulary.size, context) + causal_half + recomputed) - no_target
    assert counter.get_total_flops() == counted
