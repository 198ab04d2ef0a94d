"""What the reader of scenes accepts, of good pictures and of broken ones: python -m benchmarks.reader [--pictures 200] [--seed report]

A picture is accepted if it is read as the scene from which it was painted; one with another shape, if that is read as any of the
vocabulary. In a project with a trained image tokenizer its reconstructions are read too, by how close they are to the original. The limits
of the reader were chosen on other scenes than those that the default seed samples.
"""

from __future__ import annotations

import argparse
import math
import random

import numpy as np
import torch
from scipy import ndimage

from benchmarks.broken_scenes import GRID, KINDS, OTHER_SHAPES, SIDE
from cm3leon.config import paths
from cm3leon.evaluation.record import wilson
from cm3leon.models.vqgan import ImageTokenizer, reconstruct
from cm3leon.scenes.reading import UNKNOWN, read_scene
from cm3leon.scenes.scene import Scene, sample_scene

PSNRS = (30, 33, 36)
"""Reconstructions of at least so much PSNR are read, dB."""


def is_read_right(scene: Scene, pixels: np.ndarray) -> bool:
    """True if background and objects are those of the scene."""
    read = read_scene(pixels)
    return (read.background, sorted(item.label for item in read.objects)) == (
        scene.background,
        sorted(item.label for item in scene.objects),
    )


def is_read_as_known(scene: Scene, pixels: np.ndarray) -> bool:
    """True if as many objects are read as the scene has, all of them shapes of the vocabulary."""
    read = read_scene(pixels)
    return len(read.objects) == len(scene.objects) and all(item.shape != UNKNOWN for item in read.objects)


def blurred(pixels: np.ndarray, sigma: float, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Blur of ``sigma`` pixels, and noise of ``noise`` gray levels."""
    image = ndimage.gaussian_filter(pixels.astype(float), (sigma, sigma, 0)) + rng.normal(0, noise, pixels.shape)
    return np.clip(image.round(), 0, 255).astype(np.uint8)


def reconstructions(images: list[np.ndarray]) -> list[tuple[float, np.ndarray]]:
    """PSNR (dB) and pixels of each image through the tokenizer in ``models/``; none if there is none of this image size."""
    if not (paths.IMAGE_TOKENIZER / "config.json").is_file():
        return []
    tokenizer = ImageTokenizer.load(paths.IMAGE_TOKENIZER)
    if tokenizer.spec.image_size != len(images[0]):
        return []
    decoded = reconstruct(tokenizer, torch.from_numpy(np.stack(images)))[1].numpy()
    errors = [max(float(((one.astype(float) - other) ** 2).mean()), 1e-9) for one, other in zip(images, decoded, strict=True)]
    return [(10 * math.log10(255**2 / error), image) for error, image in zip(errors, decoded, strict=True)]


def row(name: str, accepted: list[bool]) -> str:
    """A row of the table: the share that is accepted, its 95 % interval, and the number of pictures."""
    share = float(np.mean(accepted))
    low, high = wilson(share, len(accepted))
    return f"| {name} | {share:.3f} | {low:.3f} to {high:.3f} | {len(accepted)} |"


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=200, help="of each kind")
    parser.add_argument("--seed", default="report")
    options = parser.parse_args()

    def generators(kind: str) -> list[random.Random]:
        return [random.Random(f"{options.seed}/{kind}/{number}") for number in range(options.pictures)]

    print("| good pictures | read right | 95 % interval | pictures |\n|---|---|---|---|")
    for name, grid, letters in (("painted, on a grid", GRID, 0.0), ("painted, anywhere", 0, 0.0), ("painted, letters", GRID, 1.0)):
        scenes = [sample_scene(rng, 3, grid, letters) for rng in generators(name)]
        images = [scene.render(SIDE) for scene in scenes]
        print(row(name, [is_read_right(scene, image) for scene, image in zip(scenes, images, strict=True)]))
        if letters:
            continue
        for sigma, noise in ((0.6, 4.0), (0.8, 8.0)):
            rng = np.random.default_rng(0)
            found = [is_read_right(scene, blurred(image, sigma, noise, rng)) for scene, image in zip(scenes, images, strict=True)]
            print(row(f"{name}, blur of {sigma} pixels and noise of {noise:g} levels", found))
        if grid:
            for least in PSNRS:
                close = [(scene, image) for scene, (psnr, image) in zip(scenes, reconstructions(images), strict=False) if psnr >= least]
                if close:
                    print(row(f"{name}, through the image tokenizer, PSNR of {least} dB or more", [is_read_right(*one) for one in close]))

    print("\n| broken pictures | taken for right | 95 % interval | pictures |\n|---|---|---|---|")
    for name, make in KINDS.items():
        accept = is_read_as_known if name in OTHER_SHAPES else is_read_right
        print(row(name, [accept(*make(rng)) for rng in generators(name)]))


if __name__ == "__main__":
    main()
