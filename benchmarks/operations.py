"""Time that the decoder's own operations save: python benchmarks/operations.py

In float32, on a CPU, alternating; medians.

1. A forward and backward pass of profile small's decoder, as it is and with one operation replaced by plain PyTorch. "Products by MKL"
   replaces nothing on processors of Intel.
2. The blocks' products in a pass of decoding at the shape 350M, for several rows, with the weights as they are and packed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from cm3leon.config.profiles import load_profile
from cm3leon.data.batches import Batch
from cm3leon.models.decoder import Decoder
from cm3leon.models.kernels import linear, pack_weight, packed_linear
from cm3leon.training.planning import meta_decoder


def by_reals(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotary embedding in real numbers, with pairs of one element of each half."""
    cos, sin = cos_sin.unbind(-1)
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def all_at_once(hidden: Tensor, output: Tensor, targets: Tensor, weights: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the logits of all tokens in memory at once."""
    losses = F.cross_entropy(linear(hidden, output).float(), targets, reduction="none")
    return (losses * weights).sum(), losses.detach()


REPLACED: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "products by MKL": lambda: mock.patch("cm3leon.models.kernels.prefers_onednn", return_value=False),
    "rotary embedding in real numbers": lambda: mock.patch("cm3leon.models.decoder.apply_rotary_emb", by_reals),
    "logits of all tokens at once": lambda: mock.patch("cm3leon.models.decoder.chunked_cross_entropy", all_at_once),
}


def replaced_operations(rows: int, tokens: int, rounds: int) -> None:
    """Print what a pass takes with each operation replaced."""
    torch.manual_seed(0)
    shape = meta_decoder(load_profile("small"))
    model = Decoder(shape.spec, shape.vocabulary)
    tokens_BT = torch.randint(4, model.vocabulary.size, (rows, tokens))
    batch = Batch.of_tokens(tokens_BT, torch.randint(1 + model.vocabulary.tokens_per_image, tokens_BT.shape))

    def take() -> None:
        model.zero_grad(set_to_none=True)
        total, _ = model.losses(batch)
        total.backward()

    def under(patch: AbstractContextManager[object]) -> float:
        with patch:
            return seconds(take)

    for _ in range(5):
        take()
    print("| replaced | as it is, ms | replaced, ms | ratio |\n|---|---|---|---|")
    for name, replaced in REPLACED.items():
        times = [(under(nullcontext()), under(replaced())) for _ in range(rounds)]
        ours, plain = (1000 * statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {ours:.1f} | {plain:.1f} | {statistics.median(b / a for a, b in times):.2f} |", flush=True)


def packed_products(rounds: int) -> None:
    """Print what the products of a pass of decoding take."""
    layers, width = 24, 1024
    shapes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    weights = [torch.randn(shape) for _ in range(layers) for shape in shapes]
    packed = [pack_weight(weight) for weight in weights]
    print("\n| rows | as they are, ms | packed, ms | ratio |\n|---|---|---|---|")
    with torch.inference_mode():
        for rows in (1, 2, 4, 8, 16, 32, 64):
            inputs = {size: torch.randn(rows, size) for size in (width, 4 * width)}

            def plain(inputs: dict[int, Tensor] = inputs) -> None:
                for weight in weights:
                    linear(inputs[weight.shape[1]], weight)

            def by_packed(inputs: dict[int, Tensor] = inputs) -> None:
                for weight, found in zip(weights, packed, strict=True):
                    packed_linear(inputs[weight.shape[1]], found)

            plain()
            by_packed()
            times = [(seconds(plain), seconds(by_packed)) for _ in range(rounds)]
            one, other = (1000 * statistics.median(column) for column in zip(*times, strict=True))
            print(f"| {rows} | {one:.1f} | {other:.1f} | {statistics.median(a / b for a, b in times):.2f} |", flush=True)


def seconds(run: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"rows": 16, "tokens": 185, "rounds": 60}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    replaced_operations(options.rows, options.tokens, options.rounds)
    packed_products(max(3, options.rounds // 4))
