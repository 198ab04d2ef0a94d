"""How well candidates are ranked: python benchmarks/ranking.py [--prompts 128] [--candidates 32] [--model models/finetuned]

Generates candidates for prompts of the val split with the models of the last pipeline run. Prints the composition accuracy of a random
candidate; of the best by CLIP score plus a log-likelihood with several weights, of the prompt as the image's caption, and of image and
caption, by which the project ranks; and of any candidate, which perfect ranking would reach.
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
from cm3leon.generation.rerank import caption_log_likelihoods, joint_log_likelihoods
from cm3leon.scenes import composition

WEIGHTS = (0.0, 0.003, 0.01, 0.02, 0.05, 0.1, 0.3, 1e6)


def main(prompts: int, candidates: int, model: Path) -> None:
    """Print the composition accuracy of a random candidate, of any, and of the best by each weight of :data:`WEIGHTS`."""
    generator = load_generator(load_config(), model)
    captions = [str(texts[0]) for texts in read_manifest(paths.VALIDATED, "val")["captions"]]
    captions = [caption for caption in captions if composition.parse_caption(caption) is not None][:prompts]
    if not captions:
        raise SystemExit("no caption of the val split describes a scene, so that no image can be read back")
    generated = generator.text_to_image(captions, candidates, candidates=1, likelihood=0.0)
    correct = []
    for caption, images in zip(captions, generated, strict=True):
        outcomes = composition.check_images([caption] * candidates, [image.image for image in images])
        correct.append([all(outcome.values()) for outcome in outcomes if outcome])
    right = np.array(correct)
    clip = np.array([[image.score for image in images] for images in generated])
    queries = [Query([("text", generator.parts.text_tokens(caption))], (0,)) for caption in captions for _ in range(candidates)]
    codes = [image.codes for images in generated for image in images]
    of_captions, of_both = (
        measure(generator.model, queries, codes).reshape(clip.shape) for measure in (caption_log_likelihoods, joint_log_likelihoods)
    )
    print(f"{len(captions)} prompts, {candidates} candidates: random {right.mean():.3f}, any {right.any(1).mean():.3f}")
    print("| weight of the likelihood | of the caption | of image and caption |\n|---|---|---|")
    for weight in WEIGHTS:
        best = ((clip + weight * likelihood).argmax(1) for likelihood in (of_captions, of_both))
        print(f"| {weight:g} | {' | '.join(f'{right[np.arange(len(right)), rows].mean():.3f}' for rows in best)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--model", type=Path, default=paths.FINETUNED)
    options = parser.parse_args()
    main(options.prompts, options.candidates, options.model)
