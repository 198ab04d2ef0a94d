"""Image tokenizers trained with different parameters, on the images of the last pipeline run:

    python benchmarks/image_tokenizer.py "image_tokenizer.optimizer=adamw" "image_tokenizer.encoder_kernel=3"

Each argument is one variant: changes to ``params.yaml``, separated by spaces. The table has for each variant the seconds of training and,
on the val split,

- PSNR of reconstructions, dB;
- composition accuracy of reconstructions: the ceiling of a decoder's;
- the share of codes in use;
- the entropy of a patch's code given the patch, nats an image: 0 if equal patches have equal codes.

Shapes: N images, H and W pixels, S codes of an image.
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


def code_entropy(images_NHW3: np.ndarray, codes_NS: np.ndarray, patch: int) -> float:
    """Entropy of a patch's code given its pixels, nats an image.

    Args:
        images_NHW3: uint8, square.
        patch: side of a patch, pixels.
    """
    count, side = len(images_NHW3), images_NHW3.shape[1] // patch
    patches = images_NHW3.reshape(count, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5).reshape(count * side * side, -1)
    counts: defaultdict[bytes, Counter[int]] = defaultdict(Counter)
    for pixels, code in zip(patches, codes_NS.reshape(-1).tolist(), strict=True):
        counts[pixels.tobytes()][code] += 1
    # H(code | patch) * codes an image = - sum over patches p and codes c of n(p, c) log(n(p, c) / n(p)), divided by the number of images
    return -sum(n * math.log(n / sum(codes.values())) for codes in counts.values() for n in codes.values()) / count


def trial(changes: Sequence[str]) -> str:
    """Train one variant; returns its row of the table."""
    config = changed_config(changes, PARAMS)
    section, store = config.image_tokenizer, ImageStore(paths.RAW)
    images = ImageSet(store, read_manifest(paths.VALIDATED, "train")["image"].tolist(), section.image_size)
    start = time.perf_counter()
    model = train_image_tokenizer(images, section, config.seed, torch.device("cpu"))
    seconds = time.perf_counter() - start
    held_out = read_manifest(paths.VALIDATED, "val")
    originals = ImageSet(store, held_out["image"].tolist(), section.image_size)[np.arange(len(held_out))]
    codes, reconstructions = reconstruct(model, torch.from_numpy(originals))
    captions = [str(texts[0]) for texts in held_out["captions"]]
    ceiling = composition.score(captions, [Image.fromarray(array) for array in reconstructions.numpy()]).get("composition", float("nan"))
    used = code_statistics(codes, section.codebook_size)["codebook_usage"]
    entropy = code_entropy(originals, codes.numpy(), section.downsampling)
    quality = psnr(torch.from_numpy(originals), reconstructions)
    return f"| {' '.join(changes) or 'params.yaml'} | {seconds:.0f} | {quality:.1f} | {ceiling:.3f} | {used:.2f} | {entropy:.2f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", default=[""])
    print("| changes | seconds | PSNR, dB | composition | codes used | entropy of codes given patches, nats an image |")
    print("|---|---|---|---|---|---|")
    for variant in parser.parse_args().variants:
        print(trial(variant.split()), flush=True)
