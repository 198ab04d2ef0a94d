"""Compare settings of the image tokenizer by training it on the images of the last pipeline run:

    python benchmarks/image_tokenizer.py "image_tokenizer.optimizer=adamw" "image_tokenizer.encoder_kernel=3"

Each argument is one variant: changes to ``params.yaml``, separated by spaces. The table has a row for each: seconds of training and, on
the val split, PSNR; composition accuracy of the reconstructions, which is the ceiling of a decoder; the fraction of the codebook in use;
and the entropy of a patch's code given the patch, nats per image, which is 0 if equal patches have equal codes.
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
from cm3leon.config.profiles import PARAMS, changed_config
from cm3leon.data.manifest import ImageStore, read_manifest
from cm3leon.data.pixels import ImageSet
from cm3leon.models.vqgan import reconstruct
from cm3leon.scenes import composition
from cm3leon.training.vqgan import code_statistics, psnr, train_image_tokenizer


def code_uncertainty(images: np.ndarray, codes: np.ndarray, patch: int) -> float:
    """Conditional entropy of the codes given the pixels of their patches, nats per image.

    Args:
        images: uint8 (N, H, W, 3).
        codes: int64 (N, h * w), in raster order.
        patch: side of a patch, pixels: H / h.
    """
    # H(code | patch) = -sum of n(patch, code) log(n(patch, code) / n(patch)) / N, a sum over the patches of each of N images.
    count, side = len(images), images.shape[1] // patch
    patches = images.reshape(count, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5).reshape(count * side * side, -1)
    seen: defaultdict[bytes, Counter[int]] = defaultdict(Counter)
    for pixels, code in zip(patches, codes.reshape(-1).tolist(), strict=True):
        seen[pixels.tobytes()][code] += 1
    return -sum(n * math.log(n / sum(found.values())) for found in seen.values() for n in found.values()) / count


def trial(changes: Sequence[str]) -> str:
    """Train one variant and return its row of the table."""
    config = changed_config(changes, PARAMS)
    section, store = config.image_tokenizer, ImageStore(paths.RAW)
    images = ImageSet(store, read_manifest(paths.VALIDATED, "train")["image"].tolist(), section.image_size)
    start = time.perf_counter()
    model = train_image_tokenizer(images, section, config.seed)
    seconds = time.perf_counter() - start
    held_out = read_manifest(paths.VALIDATED, "val")
    originals = ImageSet(store, held_out["image"].tolist(), section.image_size)[np.arange(len(held_out))]
    codes, reconstructions = reconstruct(model, torch.from_numpy(originals))
    captions = [str(texts[0]) for texts in held_out["captions"]]
    ceiling = composition.score(captions, [Image.fromarray(array) for array in reconstructions.numpy()]).get("composition", float("nan"))
    used = code_statistics(codes, section.codebook_size)["codebook_usage"]
    uncertainty = code_uncertainty(originals, codes.numpy(), section.downsampling)
    quality = psnr(torch.from_numpy(originals), reconstructions)
    return f"| {' '.join(changes) or 'params.yaml'} | {seconds:.0f} | {quality:.1f} | {ceiling:.3f} | {used:.2f} | {uncertainty:.2f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", default=[""])
    print("| changes | seconds | PSNR, dB | composition ceiling | codebook usage | nats of codes |\n|---|---|---|---|---|---|")
    for variant in parser.parse_args().variants:
        print(trial(variant.split()), flush=True)
