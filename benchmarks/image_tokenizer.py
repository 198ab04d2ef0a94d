"""Compare settings of the image tokenizer by training it on the images of the last pipeline run:

    python benchmarks/image_tokenizer.py "image_tokenizer.optimizer=adamw" "image_tokenizer.encoder_kernel=3"

Each argument is one variant: changes to ``params.yaml``, separated by spaces. The table has a row for each: seconds of training and, on
the val split, PSNR; composition accuracy of the reconstructions, which is the ceiling of a decoder; the fraction of the codebook in use;
patches of an image that have the code of another, more frequent patch, 0 if different patches have different codes; and the entropy of a
patch's code given the patch, nats per image, 0 if equal patches have equal codes. Scenes repeat few patches, photographs none, so that for
these the last two say nothing.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from cm3leon.config import paths
from cm3leon.config.profiles import changed_config
from cm3leon.data.manifest import ImageStore, read_manifest
from cm3leon.data.pixels import ImageSet
from cm3leon.models.vqgan import reconstruct
from cm3leon.scenes import composition
from cm3leon.stages.image_tokenizer import training_images
from cm3leon.training.vqgan import code_statistics, psnr, train_image_tokenizer


def codes_of_patches(images: np.ndarray, codes: np.ndarray, patch: int) -> Counter[tuple[bytes, int]]:
    """How often each patch, by its pixels, has each code.

    Args:
        images: uint8 (N, H, W, 3).
        codes: int64 (N, h * w), in raster order.
        patch: side of a patch, pixels: H / h.
    """
    count, side = len(images), images.shape[1] // patch
    patches = images.reshape(count, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5).reshape(count * side * side, -1)
    return Counter(zip(map(np.ndarray.tobytes, patches), codes.reshape(-1).tolist(), strict=True))


def code_uncertainty(found: Counter[tuple[bytes, int]], images: int) -> float:
    """Conditional entropy of the codes given the pixels of their patches, nats per image."""
    # H(code | patch) = -sum of n(patch, code) log(n(patch, code) / n(patch)) / N, a sum over the patches of each of N images.
    of_patch: Counter[bytes] = Counter()
    for (pixels, _), n in found.items():
        of_patch[pixels] += n
    return -sum(n * math.log(n / of_patch[pixels]) for (pixels, _), n in found.items()) / images


def confused_patches(found: Counter[tuple[bytes, int]], images: int) -> float:
    """Patches per image whose code more often stands for another patch."""
    of_code: defaultdict[int, list[int]] = defaultdict(list)
    for (_, code), n in found.items():
        of_code[code].append(n)
    return sum(sum(counts) - max(counts) for counts in of_code.values()) / images


def trial(changes: Sequence[str]) -> str:
    """Train one variant and return its row of the table."""
    config = changed_config(changes)
    section, store = config.image_tokenizer, ImageStore(paths.RAW)
    chosen = training_images(read_manifest(paths.VALIDATED, "train"), section.condition_share, config.seed)
    images = ImageSet(store, chosen, section.image_size)
    start = time.perf_counter()
    model = train_image_tokenizer(images, section, config.seed)
    seconds = time.perf_counter() - start
    held_out = read_manifest(paths.VALIDATED, "val")
    originals = ImageSet(store, held_out["image"].tolist(), section.image_size)[np.arange(len(held_out))]
    codes, reconstructions = reconstruct(model, torch.from_numpy(originals))
    captions = [str(texts[0]) for texts in held_out["captions"]]
    ceiling = composition.score(captions, [Image.fromarray(array) for array in reconstructions.numpy()]).get("composition", float("nan"))
    used = code_statistics(codes, section.codebook_size)["codebook_usage"]
    found = codes_of_patches(originals, codes.numpy(), section.downsampling)
    confused, uncertainty = confused_patches(found, len(originals)), code_uncertainty(found, len(originals))
    values = [f"{seconds:.0f}", f"{psnr(torch.from_numpy(originals), reconstructions):.1f}", f"{ceiling:.3f}", f"{used:.2f}"]
    return f"| {' | '.join([' '.join(changes) or 'params.yaml', *values, f'{confused:.3f}', f'{uncertainty:.2f}'])} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", default=[""])
    print("| changes | seconds | PSNR, dB | composition ceiling | codebook usage | confused patches | nats of codes |\n" + "|---" * 7 + "|")
    for variant in parser.parse_args().variants:
        print(trial(variant.split()), flush=True)
