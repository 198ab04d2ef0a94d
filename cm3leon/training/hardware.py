"""What a device can do, and what a token costs: for the share of the hardware's speed that training reaches (MFU)."""

from __future__ import annotations

from cm3leon.model import DecoderSpec

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
}
"""Dense bfloat16 products a second, by what a device's name contains; from the vendor's data sheets, without sparsity."""


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by the name that CUDA gives it; None if it is not known."""
    return next((flops for part, flops in PEAK_FLOPS.items() if part.lower() in device_name.lower()), None)


def flops_per_token(spec: DecoderSpec, vocabulary_size: int, context: int) -> float:
    """FLOPs of one token's forward and backward pass in a sequence of ``context`` tokens.

    Six for each weight of the blocks and of the output matrix (two forward, four backward), and attention's two products over the half of
    the context that a token sees on average: ``12 * layers * width * context / 2``. Recomputation does not count.
    """
    weights = 12 * spec.layers * spec.width**2 + vocabulary_size * spec.width
    return 6.0 * weights + 6.0 * spec.layers * spec.width * context
