"""The decoder's operations beside plain PyTorch, forward and backward pass together, in turns: python benchmarks/operations.py

By default at the shapes of a training step of profile small, products in bfloat16. Medians of ``--rounds``, milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cm3leon.loss import chunked_cross_entropy
from cm3leon.operations import attention, turn

Operation = Callable[..., Tensor]


def plain_turn(x: Tensor, turns: Tensor) -> Tensor:
    """Pairs turned by real numbers, a number of the first half with one of the second."""
    cos, sin = turns.unbind(-1)
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def plain_loss(hidden: Tensor, output: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of cross-entropies, logits of all tokens at once."""
    return (F.cross_entropy((hidden @ output.T).float(), targets, reduction="none") * weights).sum()


def cases(rows: int, tokens: int, heads: int, size: int, vocabulary: int) -> dict[str, tuple[Operation, Operation, list[Tensor]]]:
    """Name -> ours, plain, and the inputs that gradients are wanted of."""
    q, k = (torch.randn(rows, tokens, heads, size).transpose(1, 2) for _ in range(2))
    v = torch.randn(rows, tokens, heads, size).bfloat16().transpose(1, 2)
    both = torch.randn(rows, tokens, 2, heads, size)
    angles = torch.randn(rows, tokens, 2, 1, size // 2)
    turns = torch.stack([angles.cos(), angles.sin()], -1)
    hidden, output = torch.randn(rows * tokens, heads * size), torch.randn(vocabulary, heads * size) * 0.2
    targets, weights = torch.randint(vocabulary, (rows * tokens,)), torch.rand(rows * tokens)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, None, size**-0.5)

    def in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q, k, v.float(), is_causal=True).to(v.dtype)

    def in_bfloat16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)

    return {
        "attention, PyTorch's in float32": (ours, in_float32, [q, k, v]),
        "attention, PyTorch's in bfloat16": (ours, in_bfloat16, [q, k, v]),
        "turns": (lambda x: turn(x, turns), lambda x: plain_turn(x, turns), [both]),
        "loss": (
            lambda h, w: chunked_cross_entropy(h, w, targets, weights)[0],
            lambda h, w: plain_loss(h, w, targets, weights),
            [hidden, output],
        ),
    }


def seconds(operation: Operation, inputs: Sequence[Tensor]) -> float:
    """Of one forward and backward pass."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    start = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = operation(*inputs)
    y.backward(torch.ones_like(y))
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"rows": 16, "tokens": 185, "heads": 3, "size": 32, "vocabulary": 2961, "rounds": 40}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.manual_seed(0)
    print("| operation | plain, ms | here, ms | plain / here |\n|---|---|---|---|")
    for name, (here, plain, inputs) in cases(options.rows, options.tokens, options.heads, options.size, options.vocabulary).items():
        times: list[tuple[float, float]] = []
        for round_ in range(options.rounds):
            first, second = (plain, here) if round_ % 2 else (here, plain)
            pair = seconds(first, inputs), seconds(second, inputs)
            times.append(pair if round_ % 2 else pair[::-1])
        ratio = statistics.median(a / b for a, b in times)
        a, b = (1000 * statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {a:.2f} | {b:.2f} | {ratio:.2f} |", flush=True)
