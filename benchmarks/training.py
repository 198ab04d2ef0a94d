"""Speed and memory of training, compared with ``OPTForCausalLM`` of the same shape, optimizer and precision.

    python benchmarks/training.py                # tokens per second of profile small's decoder, alternating steps
    python benchmarks/training.py --shape plain  # of a small one without the options that OPT lacks
    python benchmarks/training.py --memory       # peak resident memory of a step for several sizes of vocabulary

Needs transformers. Both take whole steps (forward, backward, AdamW) on the same random tokens. Each has a process of its own, so that
neither reuses memory that the other has allocated; the processes take turns, and the ratio is that of the medians. On a GPU training is
in bfloat16, and ``--shape 350m`` and ``--shape 760m`` print tokens per second and MFU of ours alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection

import torch

from cm3leon.config.schema import Config
from cm3leon.data.batches import Batch
from cm3leon.models.decoder import Decoder, DecoderSpec
from cm3leon.sequence.grammar import Vocabulary
from cm3leon.training.hardware import flops_per_token, peak_flops
from cm3leon.training.planning import vocabulary_of
from cm3leon.utils.device import default_device
from cm3leon.utils.torchvision_compat import make_importable

SHAPES = {"plain": (4, 128, 4), "350m": (24, 1024, 16), "760m": (24, 1536, 16)}
"""Layers, width, heads; besides these there is profile small's."""
DEVICE = default_device()
LEARNING_RATE = 1e-4
WARM_UP = 3
"""First steps, which are not timed."""


def spec_of(shape: str, context: int) -> DecoderSpec:
    """Profile small's decoder; of the other shapes the paper's, without our additions, which OPT does not have."""
    if shape == "small":
        return replace(DecoderSpec.from_config(Config().pretrain.model), context=context)
    off = {"qk_norm": False, "image_positions": False, "rope": False, "previous_token": False}
    return DecoderSpec(*SHAPES[shape], context, init_std=0.006, position_std=0.0002, **off)


def step_of_ours(shape: str, context: int, vocabulary: int, tokens_BT: torch.Tensor) -> Callable[[], float]:
    """A function that takes one training step of our decoder and returns the loss. tokens_BT: int64 (batch, context)."""
    model = Decoder(spec_of(shape, context), Vocabulary(vocabulary - 8 - 4 - 64, 64, 8, 64)).to(DEVICE)
    batch = Batch.of_tokens(tokens_BT)

    def loss() -> torch.Tensor:
        total, _ = model.losses(batch)
        return total / (tokens_BT.numel() - len(tokens_BT))

    return _step(model, loss)


def step_of_opt(shape: str, context: int, vocabulary: int, tokens_BT: torch.Tensor) -> Callable[[], float]:
    """As :func:`step_of_ours`, for transformers' OPT."""
    make_importable()
    from transformers import OPTConfig, OPTForCausalLM

    spec = spec_of(shape, context)
    config = OPTConfig(
        vocab_size=vocabulary, hidden_size=spec.width, num_hidden_layers=spec.layers, ffn_dim=4 * spec.width,
        num_attention_heads=spec.heads, max_position_embeddings=context, word_embed_proj_dim=spec.width, dropout=0.0, enable_bias=False,
        layer_norm_elementwise_affine=False, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = OPTForCausalLM(config).to(DEVICE)
    return _step(model, lambda: model(input_ids=tokens_BT, labels=tokens_BT).loss)


def _step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    precision = torch.autocast("cuda", dtype=torch.bfloat16) if DEVICE.type == "cuda" else nullcontext()

    def take() -> float:
        optimizer.zero_grad(set_to_none=True)
        with precision:
            value = loss()
        value.backward()
        optimizer.step()
        return value.item()

    return take


STEPS = {"ours": step_of_ours, "opt": step_of_opt}


def seconds(step: Callable[[], float]) -> float:
    """Duration of one step, seconds."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def worker(which: str, shape: str, batch: int, context: int, vocabulary: int, pipe: Connection) -> None:
    """Take a step for each True that is received, and send its duration; end at False."""
    torch.manual_seed(0)
    tokens = torch.randint(vocabulary, (batch, context), device=DEVICE)
    step = STEPS[which](shape, context, vocabulary, tokens)
    while pipe.recv():
        pipe.send(seconds(step))


def compare(shape: str, batch: int, context: int, vocabulary: int, rounds: int) -> None:
    """Alternate steps of the two; print tokens per second and the ratio of the medians."""
    processes = multiprocessing.get_context("spawn")  # a fork would inherit the memory of this process
    ends: dict[str, Connection] = {}
    for which in STEPS:
        ends[which], worker_end = processes.Pipe()
        processes.Process(target=worker, args=(which, shape, batch, context, vocabulary, worker_end), daemon=True).start()
        worker_end.close()  # so that a worker that fails is noticed
    durations: dict[str, list[float]] = {which: [] for which in STEPS}
    for number in range(rounds + WARM_UP):
        for which, end in ends.items():
            end.send(True)
            duration = end.recv()
            if number >= WARM_UP:
                durations[which].append(duration)
    for end in ends.values():
        end.send(False)
    medians = {which: statistics.median(found) for which, found in durations.items()}
    row = " | ".join(f"{batch * context / medians[which]:,.0f}" for which in STEPS)
    print(f"| {shape} | {batch} x {context} | {vocabulary} | {row} | {medians['opt'] / medians['ours']:.2f} |", flush=True)


def alone(shape: str, batch: int, context: int, vocabulary: int, rounds: int) -> None:
    """Print tokens per second and MFU of ours."""
    tokens = torch.randint(vocabulary, (batch, context), device=DEVICE)
    step = step_of_ours(shape, context, vocabulary, tokens)
    durations = [seconds(step) for _ in range(rounds + WARM_UP)][WARM_UP:]
    rate = tokens.numel() / statistics.median(durations)
    peak = peak_flops(torch.cuda.get_device_name()) if DEVICE.type == "cuda" else None
    mfu = rate * flops_per_token(spec_of(shape, context), vocabulary, context) / peak if peak else float("nan")
    print(f"| {shape} | {batch} x {context} | {vocabulary} | {rate:,.0f} tokens/s | MFU {mfu:.1%} |", flush=True)


def peak_megabytes(which: str, batch: int, context: int, vocabulary: int) -> float:
    """Peak resident memory of two steps above that before them, MB, in a process of its own."""
    code = (
        "import resource, sys; sys.path.insert(0, 'benchmarks'); import torch, training; "
        f"tokens = torch.randint({vocabulary}, ({batch}, {context}), device=training.DEVICE); "
        f"step = training.step_of_{which}('plain', {context}, {vocabulary}, tokens); "
        "now = int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize(); step(); step(); "
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - now) / 1e6)"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=["small", *SHAPES], default="small")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=vocabulary_of(Config()).size, help="by default profile small's")
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    if options.memory:
        print("| vocabulary | ours, MB | OPT, MB | ratio |\n|---|---|---|---|")
        for size in (2563, 16384, 65536):
            ours, opt = (peak_megabytes(which, options.batch, options.context, size) for which in ("ours", "opt"))
            print(f"| {size} | {ours:,.0f} | {opt:,.0f} | {ours / opt:.2f} |", flush=True)
    elif options.shape in ("small", "plain"):
        print("| shape | batch | vocabulary | ours, tokens/s | OPT, tokens/s | ratio |\n|---|---|---|---|---|---|")
        compare(options.shape, options.batch, options.context, options.vocabulary, options.rounds)
    else:
        alone(options.shape, options.batch, options.context, options.vocabulary, options.rounds)
