"""Time that the decoder's own operations save: python benchmarks/operations.py

A forward and backward pass of profile small's decoder, as it is and with one operation replaced by plain PyTorch, alternating. In
float32, on a CPU. Medians of ``--rounds``, milliseconds.
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
from cm3leon.training.planning import meta_decoder


def by_reals(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotary embedding in real numbers, with pairs of one element of each half."""
    cos, sin = cos_sin.unbind(-1)
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def all_at_once(hidden: Tensor, output: Tensor, targets: Tensor, weights: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the logits of all tokens in memory at once."""
    losses = F.cross_entropy((hidden @ output.T).float(), targets, reduction="none")
    return (losses * weights).sum(), losses.detach()


REPLACED: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "rotary embedding in real numbers": lambda: mock.patch("cm3leon.models.decoder.apply_rotary_emb", by_reals),
    "logits of all tokens at once": lambda: mock.patch("cm3leon.models.decoder.chunked_cross_entropy", all_at_once),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"rows": 16, "tokens": 185, "rounds": 60}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.manual_seed(0)
    shape = meta_decoder(load_profile("small"))
    model = Decoder(shape.spec, shape.vocabulary)
    tokens = torch.randint(4, model.vocabulary.size, (options.rows, options.tokens))
    batch = Batch.of_tokens(tokens, torch.randint(1 + model.vocabulary.tokens_per_image, tokens.shape))

    def seconds(patch: AbstractContextManager[object]) -> float:
        """Seconds of a forward and backward pass under ``patch``."""
        start = time.perf_counter()
        model.zero_grad(set_to_none=True)
        with patch:
            total, _ = model.losses(batch)
            total.backward()
        return time.perf_counter() - start

    for _ in range(5):
        seconds(nullcontext())
    print("| replaced | as it is, ms | replaced, ms | ratio |\n|---|---|---|---|")
    for name, replaced in REPLACED.items():
        times = [(seconds(nullcontext()), seconds(replaced())) for _ in range(options.rounds)]
        ours, plain = (1000 * statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {ours:.1f} | {plain:.1f} | {statistics.median(b / a for a, b in times):.2f} |", flush=True)
