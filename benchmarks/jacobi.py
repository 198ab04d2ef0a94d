"""Jacobi decoding of images against decoding code by code: python -m benchmarks.jacobi [--prompts 64] [--rounds 5]

With the models of the last pipeline run and prompts of the val split, one prompt at a time: passes and milliseconds a prompt,
alternating with windows of one code, which must give the same codes. Then what a pass of the shape 350M costs by the tokens that it reads,
with random weights and the image rows of the output matrix, of one row and of two, as guidance needs. With the passes of the first part it
predicts the gain of a trained model of that shape.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.generation import DEVICE, guidance_streams, make_model
from cm3leon.config import paths
from cm3leon.config.schema import DecodingConfig
from cm3leon.data.manifest import read_manifest
from cm3leon.generation import engine
from cm3leon.generation.cache import DecodingCache, read_prompts
from cm3leon.generation.image_requests import image_request
from cm3leon.generation.parts import load_parts
from cm3leon.generation.sampling import Sampler
from cm3leon.models.decoder import Decoder
from cm3leon.sequence.grammar import Prompt

SETTINGS: list[dict[str, Any]] = [
    {},
    {"guidance": 1.0, "temperature": 1.0},
    {"guidance": 3.0, "temperature": 1.0, "top_p": 0.9},
    {"contrastive": 1.0, "contrastive_k": 1},
]
"""What differs from the defaults of profile small; every prompt has one candidate, and then several."""
CANDIDATES = (1, 4, 16, 32)
WINDOWS = (1, 2, 4, 6, 8, 12, 16)
TOKENS = 64
"""Codes of an image whose passes are timed: as many as profile small's images have."""


def passes_and_seconds(model: Decoder, streams: Sequence[Prompt], seeds: list[int], sampler: Sampler) -> tuple[np.ndarray, int, float]:
    """Codes of a prompt's candidates, the passes, that of the prompt included, and seconds."""
    reads: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, arguments: reads.append(1))
    start = time.perf_counter()
    codes = engine.generate_images(model, [list(streams)], [seeds], sampler)
    seconds = time.perf_counter() - start
    handle.remove()
    return codes, len(reads), seconds


def shown(values: Sequence[float], form: str = ".1f") -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def compare(prompts: int, rounds: int) -> dict[int, float]:
    """Print passes and milliseconds of both ways of decoding, for each of :data:`SETTINGS`.

    Returns:
        Median passes of an image by its rows: 2 with guidance, as in the profile, 1 without.
    """
    parts = load_parts(
        model=paths.FINETUNED, image_tokenizer=paths.IMAGE_TOKENIZER, text_tokenizer=paths.TEXT_TOKENIZER, decoding=DecodingConfig()
    )
    captions = [str(texts[0]) for texts in read_manifest(paths.VALIDATED, "val")["captions"][:prompts]]
    requests = [image_request(parts, "text_to_image", caption, {"caption": caption}) for caption in captions]
    chosen = engine.window_length
    print("| settings | candidates | window | passes | ms a prompt | ms, one by one | times as fast | codes that differ |")
    print("|" + "---|" * 8)
    runs = [(changes, 1) for changes in SETTINGS] + [({}, count) for count in CANDIDATES[1:]]
    by_rows: dict[int, float] = {}
    for changes, candidates in runs:
        sampler = Sampler(DecodingConfig.model_validate({"tasks": {}, **changes}))
        found: dict[str, list[float]] = {"passes": [], "jacobi": [], "single": [], "ratio": []}
        differing = total = 0
        for number, request in enumerate(requests):
            streams = request.streams[: sampler.streams_needed(len(request.streams))]
            seeds = list(range(candidates * number, candidates * (number + 1)))
            taken: dict[str, list[float]] = {"jacobi": [], "single": []}
            for _ in range(rounds):
                engine.window_length = chosen
                codes, passes, seconds = passes_and_seconds(parts.model, streams, seeds, sampler)
                taken["jacobi"].append(seconds)
                engine.window_length = lambda width, rows, steps: 1
                expected, _, seconds = passes_and_seconds(parts.model, streams, seeds, sampler)
                taken["single"].append(seconds)
            differing, total = differing + int((codes != expected).sum()), total + codes.size
            jacobi, single = (1e3 * min(taken[way]) for way in ("jacobi", "single"))
            for name, value in (("passes", passes), ("jacobi", jacobi), ("single", single), ("ratio", single / jacobi)):
                found[name].append(value)
        window = chosen(parts.model.spec.width, len(streams) * candidates, parts.model.vocabulary.tokens_per_image - 1)
        times = f"{shown(found['jacobi'])} | {shown(found['single'])} | {shown(found['ratio'], '.2f')}"
        row = f"{changes or 'as in the profile'} | {candidates} | {window} | {shown(found['passes'], '.0f')} | {times}"
        print(f"| {row} | {differing} of {total} |", flush=True)
        by_rows.setdefault(len(streams), statistics.median(found["passes"]))
    engine.window_length = chosen
    return by_rows


def predict(shape: str, rounds: int, passes: dict[int, float]) -> None:
    """Print what passes of the shape cost, and how much faster that makes images that take so many passes, by rows."""
    model = make_model(shape, TOKENS)
    model.pack()
    for rows, count in passes.items():
        costs = pass_costs(model, rows, rounds)
        print(f"| {shape}, rows: {rows}; window | ms a pass | least ms | times a window of one |\n|---|---|---|---|")
        for window, times in costs.items():
            print(f"| {window} | {shown(times)} | {min(times):.1f} | {min(times) / min(costs[1]):.2f} |")
        window = engine.window_length(model.spec.width, rows, TOKENS - 1)
        gain = TOKENS * min(costs[1]) / (count * min(costs[window]))
        print(f"\npredicted with {count:.0f} passes of {window} codes instead of {TOKENS} of one: {gain:.1f} times as fast\n", flush=True)


@torch.inference_mode()
def pass_costs(model: Decoder, rows: int, rounds: int) -> dict[int, list[float]]:
    """Milliseconds of passes of so many rows, by window."""
    streams = guidance_streams(model)[:rows]
    prompt, _ = read_prompts(model, streams, [0] * rows)
    cache = DecodingCache(prompt, 1, TOKENS - 1)
    start, stop = model.vocabulary.image_start, model.vocabulary.text_start
    taken: dict[int, list[float]] = {window: [] for window in WINDOWS}
    for number in range(rounds + 1):
        for window in WINDOWS:
            tokens = torch.full((rows, window), start, device=DEVICE)
            begin = time.perf_counter()
            hidden = cache.advance(model, tokens, torch.ones_like(tokens), torch.full((rows,), TOKENS // 2, device=DEVICE))
            model.logits(hidden, start, stop)
            if number:  # the first pass is slower
                taken[window].append(1e3 * (time.perf_counter() - begin))
    return taken


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", default="350m", help="shape of benchmarks/generation.py whose passes are timed")
    options = parser.parse_args()
    predict(options.shape, 4 * options.rounds, compare(options.prompts, options.rounds))
