"""How well candidates are ranked: python benchmarks/ranking.py [--prompts 128] [--candidates 32] [--model models/finetuned]

Generates candidates for prompts of the val split with the models of the last pipeline run. Prints the composition accuracy of a random
candidate; of the best by CLIP score, by the prompt's log-likelihood as the image's caption, and by their sum with several weights; and of
any candidate, which perfect ranking would reach.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from cm3leon.config import paths
from cm3leon.config.loading import load_config
from cm3leon.data.manifest import read_manifest
from cm3leon.evaluation.run import load_generator
from cm3leon.generation.image_requests import Query
from cm3leon.generation.rerank import caption_log_likelihoods
from cm3leon.scenes import composition

WEIGHTS = (0.0, 0.003, 0.01, 0.02, 0.05, 0.1, 0.3, 1e6)


def main(prompts: int, candidates: int, model: Path) -> None:
    generator = load_generator(load_config(), model)
    captions = [str(texts[0]) for texts in read_manifest(paths.VALIDATED, "val")["captions"]]
    captions = [caption for caption in captions if composition.parse_caption(caption) is not None][:prompts]
    generated = generator.text_to_image(captions, candidates, candidates=1, likelihood=0.0)
    correct = []
    for caption, images in zip(captions, generated, strict=True):
        outcomes = composition.check_images([caption] * candidates, [image.image for image in images])
        correct.append([all(outcome.values()) for outcome in outcomes if outcome])
    right = np.array(correct)
    clip = np.array([[image.score for image in images] for images in generated])
    queries = [Query([("text", generator.parts.text_tokens(caption))], (0,)) for caption in captions for _ in range(candidates)]
    codes = [image.codes for images in generated for image in images]
    likelihood = caption_log_likelihoods(generator.model, queries, codes).reshape(clip.shape)
    print(f"{len(captions)} prompts, {candidates} candidates: random {right.mean():.3f}, any {right.any(1).mean():.3f}")
    print("| weight of the likelihood | composition |\n|---|---|")
    for weight in WEIGHTS:
        best = (clip + weight * likelihood).argmax(1)
        print(f"| {weight:g} | {right[np.arange(len(right)), best].mean():.3f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--model", type=Path, default=paths.FINETUNED)
    options = parser.parse_args()
    main(options.prompts, options.candidates, options.model)
