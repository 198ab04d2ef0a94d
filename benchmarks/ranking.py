"""How well candidates are ranked: python benchmarks/ranking.py [--prompts 128] [--candidates 32] [--model models/finetuned]

Draws candidates for prompts of the val split with the models that the last pipeline run left. Prints the composition accuracy of a random
one; of the best by CLIP score, by how likely the model reads the prompt from the image, and by both with several weights; and of any, which
is what perfect ranking would reach.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from cm3leon.config import paths
from cm3leon.config.schema import load_config
from cm3leon.data.manifest import read_manifest
from cm3leon.generation.prompts import Query
from cm3leon.generation.rerank import read_likelihoods
from cm3leon.scenes import composition
from cm3leon.stages.evaluate import load

WEIGHTS = (0.0, 0.003, 0.01, 0.02, 0.05, 0.1, 0.3, 1e6)


def main(prompts: int, candidates: int, model: Path) -> None:
    generator = load(load_config(), model)
    captions = [str(texts[0]) for texts in read_manifest(paths.VALIDATED, "val")["captions"]]
    captions = [caption for caption in captions if composition.parse_caption(caption) is not None][:prompts]
    drawn = generator.text_to_image(captions, candidates, candidates=1, likelihood=0.0)
    right = np.array(
        [
            [all(verdict.values()) for verdict in composition.verdicts([caption] * candidates, [i.image for i in images]) if verdict]
            for caption, images in zip(captions, drawn, strict=True)
        ]
    )
    clip = np.array([[image.score for image in images] for images in drawn])
    queries = [Query([("text", generator.ids(caption))], (0,)) for caption in captions for _ in range(candidates)]
    read = read_likelihoods(generator.model, queries, [image.codes for images in drawn for image in images]).reshape(clip.shape)
    print(f"{len(captions)} prompts, {candidates} candidates: random {right.mean():.3f}, any {right.any(1).mean():.3f}")
    print("| weight of the likelihood | composition |\n|---|---|")
    for weight in WEIGHTS:
        best = (clip + weight * read).argmax(1)
        print(f"| {weight:g} | {right[np.arange(len(right)), best].mean():.3f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--model", type=Path, default=paths.FINETUNED)
    options = parser.parse_args()
    main(options.prompts, options.candidates, options.model)
