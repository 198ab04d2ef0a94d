"""What devices can do, and what a token costs: for plans, and for the share of a device's speed that training reaches (MFU)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import torch


class Shape(Protocol):
    """Of a decoder: what decides its cost."""

    @property
    def layers(self) -> int: ...
    @property
    def width(self) -> int: ...


@dataclass(frozen=True)
class Device:
    """A kind of accelerator.

    Attributes:
        name: as the user writes it.
        words: that are all among the words of the name its driver gives it.
        flops: dense bfloat16 products a second with float32 sums, as the vendor states them, without sparsity.
        memory: bytes, by the vendor's GB of 10**9; a little less than the driver shows for most.
    """

    name: str
    words: tuple[str, ...]
    flops: float
    memory: float


# Vendors' data sheets. Where NVIDIA prints the figure with sparsity, half of it stands here.
DEVICES = (
    Device("a100", ("a100", "80gb"), 312e12, 80e9),  # NVIDIA A100 Tensor Core GPU (A100 80GB): 312
    Device("a100-40gb", ("a100",), 312e12, 40e9),  # the same sheet, A100 40GB
    Device("h100-pcie", ("h100", "pcie"), 756e12, 80e9),  # NVIDIA H100 PCIe: 1,513 with sparsity
    Device("h100-nvl", ("h100", "nvl"), 835e12, 94e9),  # NVIDIA H100 NVL: 1,671 with sparsity
    Device("h100", ("h100",), 989e12, 80e9),  # NVIDIA H100 SXM: 1,979 with sparsity
    Device("h200-nvl", ("h200", "nvl"), 835e12, 141e9),  # NVIDIA H200 NVL: 1,671 with sparsity
    Device("h200", ("h200",), 989e12, 141e9),  # NVIDIA H200 SXM: 1,979 with sparsity
    Device("gh200", ("gh200",), 989e12, 96e9),  # NVIDIA GH200 Grace Hopper Superchip, HBM3: 1,979 with sparsity
    Device("b200", ("b200",), 2250e12, 180e9),  # NVIDIA HGX B200, an eighth of it: 4,500 with sparsity
    Device("l40s", ("l40s",), 362e12, 48e9),  # NVIDIA L40S: 733 with sparsity, 362.05 without
    Device("l4", ("l4",), 121e12, 24e9),  # NVIDIA L4: 242 with sparsity
    Device("a10", ("a10",), 125e12, 24e9),  # NVIDIA A10: 125
    Device("a10g", ("a10g",), 70e12, 24e9),  # NVIDIA A10G, as in cloud machines: 70
    Device("rtx-4090", ("rtx", "4090"), 165e12, 24e9),  # NVIDIA Ada GPU architecture whitepaper, GeForce RTX 4090: 165.2
    Device("mi300x", ("mi300x",), 1307e12, 192e9),  # AMD Instinct MI300X: 1,307.4
)
"""What is known, a name with more words before the same with fewer."""

OTHERS = {"mig", "laptop", "d"}
"""Words of a name that make a device a slice or a slower kind of the one it is called after."""


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by what ``torch.cuda.get_device_name()`` says; None if it is not known."""
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    if words & OTHERS:
        return None
    return next((device.flops for device in DEVICES if words.issuperset(device.words)), None)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products in bfloat16, rather than emulating them in float32, which is slower than that."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def flops_per_token(spec: Shape, vocabulary_size: int, context: int) -> float:
    """FLOPs of one token's forward and backward pass in a sequence of ``context`` tokens: ``6 N + 12 * layers * width * context / 2``.

    N are the weights of the blocks, ``12 * layers * width ** 2``, and of the output matrix, ``vocabulary_size * width``: each is two FLOPs
    forward and four backward. The second term is attention's two products, over the half of the context that a token sees on average
    (causal). Looking up embeddings, norms and softmax are left out, and what is computed again for activation checkpointing does not count.
    """
    weights = 12 * spec.layers * spec.width**2 + vocabulary_size * spec.width
    return 6.0 * weights + 6.0 * spec.layers * spec.width * context
