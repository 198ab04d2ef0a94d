"""Sweep decoding settings on prompts of the val split: python benchmarks/decoding.py [--prompts 200]

Composition accuracy, by attribute, for temperatures, guidance scales, numbers of candidates and ways of ranking them, with the models of
the last pipeline run. The test split, which the evaluation uses, is not touched: a profile's defaults are chosen here.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

from cm3leon.config import paths
from cm3leon.config.schema import DecodingConfig
from cm3leon.data.manifest import read_manifest
from cm3leon.generation.checks import checked_settings
from cm3leon.generation.generator import Generator
from cm3leon.scenes import composition

RANKED = {"candidates": 32, "likelihood": 0.03}
GRID: list[dict[str, Any]] = [
    *({"temperature": t, "guidance": g, "candidates": 1} for t, g in itertools.product((0.0, 0.7, 1.0), (1.0, 1.5, 2.0, 3.0))),
    {"temperature": 0.7, "guidance": 2.0, "candidates": 1, "guidance_schedule": "cosine"},
    *({"temperature": t, "guidance": 1.5, **RANKED} for t in (0.5, 0.7, 0.85, 1.0)),
    *({"temperature": 0.7, "guidance": 1.5, "candidates": c, "likelihood": 0.03} for c in (8, 16, 64)),
    *({"temperature": 0.7, "guidance": 1.5, "candidates": 32, "likelihood": w} for w in (0.0, 0.01, 0.1)),
    {"temperature": 0.7, "guidance": 1.5, **RANKED, "top_p": 0.98},
    {"temperature": 0.7, "guidance": 1.5, **RANKED, "retrieved_documents": 1},
]
"""Settings of each run; others have their defaults: top-p 1, likelihood 0, no retrieved documents."""
SETTINGS = ("temperature", "top_p", "guidance", "guidance_schedule", "candidates", "likelihood", "retrieved_documents")


def main(prompts: int) -> None:
    """Print a table with a row for each setting of :data:`GRID`."""
    generator = Generator.from_parts(
        model=paths.FINETUNED,
        image_tokenizer=paths.IMAGE_TOKENIZER,
        text_tokenizer=paths.TEXT_TOKENIZER,
        encoder=paths.ENCODER,
        memory_bank=paths.INDEX,
        tokens=paths.TOKENS,
        decoding=DecodingConfig(top_p=1.0, likelihood=0.0, tasks={}),
    )
    captions = [str(texts[0]) for texts in read_manifest(paths.VALIDATED, "val")["captions"][:prompts]]
    print(f"| {' | '.join(SETTINGS)} | composition | background | count | color | shape | size | relation | s |")
    print("|" + "---|" * (len(SETTINGS) + 8))
    for settings in GRID:
        start = time.perf_counter()
        generated = [images[0].image for images in generator.text_to_image(captions, **settings)]
        scores = composition.score(captions, generated)
        names = ("", "/background", "/count", "/color", "/shape", "/size", "/relation")
        shown = [f"{scores.get(f'composition{name}', float('nan')):.3f}" for name in names]
        used = checked_settings(generator.decoding, settings)
        columns = [str(getattr(used, key)) for key in SETTINGS]
        print("| " + " | ".join([*columns, *shown, f"{time.perf_counter() - start:.1f}"]) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    main(parser.parse_args().prompts)
