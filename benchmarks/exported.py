"""Image generation here and by ``generate`` of the export for transformers: python -m benchmarks.exported [--prompts 32] [--rounds 5]

The same trained weights, those of the last pipeline run; prompts of the val split, one at a time, with the profile's temperature and
guidance, for one candidate and for eight. Both run in this process, alternating; the ratio is of the medians over all prompts and rounds.
Before that both generate greedily with guidance, and the images that are equal are counted. Several codes are guessed a pass here, as
always in the package; ``benchmarks/generation.py`` compares with OPT, code by code. Both on the CPU. Needs
transformers.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cm3leon.config import paths
from cm3leon.config.loading import load_config
from cm3leon.config.schema import DecodingConfig
from cm3leon.data.manifest import read_manifest
from cm3leon.generation.engine import generate_images
from cm3leon.generation.image_requests import image_request
from cm3leon.generation.parts import Parts, load_parts
from cm3leon.generation.sampling import Sampler
from cm3leon.registry.transformers_export import export_model
from cm3leon.sequence.grammar import Prompt
from cm3leon.utils.torchvision_compat import make_importable

CANDIDATES = (1, 8)


def ours(parts: Parts, streams: Sequence[Prompt], candidates: int, decoding: DecodingConfig) -> np.ndarray:
    """Codes (candidates, tokens_per_image) of a prompt."""
    return generate_images(parts.model, [list(streams)], [list(range(candidates))], Sampler(decoding))[0]


def theirs(model: Any, parts: Parts, prompt: Prompt, candidates: int, decoding: DecodingConfig) -> np.ndarray:
    """As :func:`ours`, by ``generate`` of transformers."""
    tokens = torch.from_numpy(prompt.tokens)[None]
    sampling: dict[str, Any] = {"do_sample": False}
    if decoding.temperature:
        sampling = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k or 0}
    per_image = parts.model.vocabulary.tokens_per_image
    found = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), guidance_scale=decoding.guidance, num_return_sequences=candidates,
        max_new_tokens=per_image, **sampling,
    )  # fmt: skip
    return found[:, -per_image:].numpy() - parts.model.vocabulary.image_start


def load_exported(parts: Parts) -> Any:
    """The decoder in transformers, through a directory that is removed again."""
    make_importable()
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        export_model(parts.model, paths.FINETUNED, Path(folder) / "exported")
        return AutoModelForCausalLM.from_pretrained(Path(folder) / "exported", trust_remote_code=True).eval()


def milliseconds(run: Callable[[], object]) -> float:
    """Milliseconds that one call takes."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def compare(prompts: int, rounds: int) -> None:
    """Print milliseconds a prompt of both, and their ratio."""
    decoding = load_config().decoding.model_copy(update={"tasks": {}})
    parts = load_parts(
        model=paths.FINETUNED, image_tokenizer=paths.IMAGE_TOKENIZER, text_tokenizer=paths.TEXT_TOKENIZER, decoding=decoding, device="cpu"
    )
    model = load_exported(parts)
    captions = [str(texts[0]) for texts in read_manifest(paths.VALIDATED, "val")["captions"][:prompts]]
    requests = [image_request(parts, "text_to_image", caption, {"caption": caption}) for caption in captions]
    greedy = decoding.model_copy(update={"temperature": 0.0})
    equal = sum(
        int((ours(parts, request.streams, 1, greedy) == theirs(model, parts, request.streams[0], 1, greedy)).all()) for request in requests
    )
    print(f"greedy images that are equal: {equal} of {len(requests)}; {torch.get_num_threads()} threads\n")
    print("| candidates | here, ms a prompt | transformers, ms a prompt | times as fast |\n|---|---|---|---|")
    for candidates in CANDIDATES:
        here: list[float] = []
        there: list[float] = []
        for request in rounds * requests:
            here.append(milliseconds(partial(ours, parts, request.streams, candidates, decoding)))
            there.append(milliseconds(partial(theirs, model, parts, request.streams[0], candidates, decoding)))
        ratio = statistics.median(there) / statistics.median(here)
        print(f"| {candidates} | {with_quartiles(here)} | {with_quartiles(there)} | {ratio:.2f} |", flush=True)


def with_quartiles(values: Sequence[float]) -> str:
    """Median, and the quartiles in parentheses."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return f"{median:.0f} ({low:.0f} to {high:.0f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    compare(options.prompts, options.rounds)
