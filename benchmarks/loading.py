"""How long tokenizing and embedding take beside decoding and the network alone: python benchmarks/loading.py [--images 256]

Made-up photographs of 640 x 480 pixels as JPEG, and pictures of 64 pixels as PNG, on this machine's CPU with untrained networks of profile
``small``'s shape. The bar is 1.2 times the sum of both alone.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from cm3leon.config.profiles import load_profile
from cm3leon.data.loading import Square, image_batches
from cm3leon.data.manifest import ImageStore
from cm3leon.models.vqgan import ImageTokenizer
from cm3leon.training.vqgan import make_spec
from cm3leon.utils.images import to_channels_first

BATCH = 64


def write_images(directory: Path, count: int, size: tuple[int, int], kind: str) -> list[str]:
    """A shard of noise with ellipses; the references of its images."""
    rng = np.random.default_rng(0)
    with tarfile.open(directory / "images-00000.tar", "w") as archive:
        for number in range(count):
            image = Image.fromarray(rng.integers(100, 130, (size[1], size[0], 3), dtype=np.uint8))
            draw = ImageDraw.Draw(image)
            for _ in range(8):
                x, y, side = (int(value) for value in rng.integers(0, max(size) // 2, 3))
                draw.ellipse((x, y, x + side, y + side), fill=tuple(rng.integers(256, size=3).tolist()))
            buffer = io.BytesIO()
            image.save(buffer, kind)
            header = tarfile.TarInfo(f"{number}.{kind.lower()}")
            header.size = buffer.tell()
            buffer.seek(0)
            archive.addfile(header, buffer)
    return [f"images-00000.tar/{number}.{kind.lower()}" for number in range(count)]


def seconds(run: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(make_spec(load_profile("small").image_tokenizer)).eval()
    square = Square(tokenizer.spec.image_size)
    print("| images | decoding alone, s | network alone, s | together, s | of the sum |\n|---|---|---|---|---|")
    for name, size, kind in (("640 x 480 JPEG", (640, 480), "JPEG"), ("64 x 64 PNG", (64, 64), "PNG")):
        with tempfile.TemporaryDirectory() as directory:
            refs = write_images(Path(directory), options.images, size, kind)
            store = ImageStore(directory)
            pixels = list(image_batches(store, refs, square, BATCH))

            def encode(batch: torch.Tensor) -> torch.Tensor:
                return tokenizer.encode(to_channels_first(batch))

            times = [
                (
                    seconds(lambda: [square(store.open(ref)) for ref in refs]),  # noqa: B023 (called at once)
                    seconds(lambda: [encode(batch) for batch in pixels]),  # noqa: B023
                    seconds(lambda: [encode(batch) for batch in image_batches(store, refs, square, BATCH)]),  # noqa: B023
                )
                for _ in range(options.rounds)
            ]
        ratios = [both / (one + other) for one, other, both in times]
        decoding, network, both = (statistics.median(column) for column in zip(*times, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {options.images} of {name} | {decoding:.2f} | {network:.2f} | {both:.2f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
