"""Peak FLOP/s and memory of accelerators, and training FLOPs per token: for plans and for model FLOPs utilization (MFU)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol


class Shape(Protocol):
    """The sizes of a decoder that decide its FLOPs."""

    @property
    def layers(self) -> int: ...
    @property
    def width(self) -> int: ...


@dataclass(frozen=True)
class Device:
    """A kind of accelerator.

    Attributes:
        name: as in ``cm3leon plan --device``.
        words: the name that the driver reports has all of these words.
        flops: peak FLOP/s of dense bfloat16 matrix products with float32 accumulation, without sparsity, by the vendor's data sheet.
        memory: bytes, by the vendor's GB of 10**9; most drivers report a little more.
    """

    name: str
    words: tuple[str, ...]
    flops: float
    memory: float


# By the vendors' data sheets, named in the comments with the TFLOP/s that they print. Those printed with sparsity are halved here.
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
"""Known devices. The first match counts, so a device with more words comes before one with a part of them."""

UNKNOWN_VARIANTS = {"mig", "laptop", "d"}
"""Words of driver names for a slice or a slower variant of a known device, whose peak is not known."""


def peak_flops(device_name: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of a device by its ``torch.cuda.get_device_name()``; None if the device is not known."""
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    if words & UNKNOWN_VARIANTS:
        return None
    return next((device.flops for device in DEVICES if words.issuperset(device.words)), None)


def flops_per_token(spec: Shape, vocabulary_size: int, context: float) -> float:
    """FLOPs of one token's forward and backward pass in a sequence of ``context`` tokens: ``6 N + 6 * layers * width * context``.

    The count of PaLM (arXiv 2204.02311, appendix B), but for causal attention:

    - N weights, ``12 * layers * width**2`` of the blocks and ``vocabulary_size * width`` of the output matrix, take two FLOPs each in the
      forward pass and four in the backward pass.
    - Attention's two products take ``12 * layers * width * context`` over the whole context; a token attends to half of it on average.

    Embedding lookups, norms, softmax and the recomputation of activation checkpointing are not counted.
    """
    weights = 12 * spec.layers * spec.width**2 + vocabulary_size * spec.width
    return 6.0 * weights + 6.0 * spec.layers * spec.width * context
