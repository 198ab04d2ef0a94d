"""How long tokenizing and embedding take beside decoding and the network alone: python benchmarks/loading.py [--images 256]

Made-up photographs of 640 x 480 pixels as JPEG, and pictures of 64 pixels as PNG, on this machine's CPU with untrained networks of profile
``small``'s shape, in what ``tokenize`` and ``index`` do with their images. The bar is 1.2 times the sum of both alone. The three are timed
in turn; medians over the rounds, and of the ratio the range too.
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
from cm3leon.models.clip import Encoder, build_clip, embed_pixels, trained_settings
from cm3leon.models.pixels import to_channels_first
from cm3leon.models.vqgan import ImageTokenizer
from cm3leon.stages.tokenize import ImageReader
from cm3leon.training.vqgan import make_spec
from cm3leon.utils.progress import progress

CPU = torch.device("cpu")


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


class Tokenize:
    """What ``tokenize`` does with its images."""

    def __init__(self) -> None:
        config = load_profile("small")
        self.tokenizer = ImageTokenizer(make_spec(config.image_tokenizer)).eval()
        self.prepare, self.batch_size = Square(config.image_tokenizer.image_size), config.tokenize.batch_size

    def network(self, pixels_BHW3: torch.Tensor) -> None:
        self.tokenizer.encode(to_channels_first(pixels_BHW3))

    def stage(self, store: ImageStore, refs: list[str]) -> None:
        with progress("tokenizing", shown=False) as meter:
            list(ImageReader(store, self.tokenizer, self.batch_size, CPU, torch.float32, meter).codes(refs))


class Index:
    """What ``index`` does with its images."""

    def __init__(self) -> None:
        config = load_profile("small")
        settings = trained_settings(config.encoder, config.encoder.vocabulary_size)
        self.encoder = Encoder(build_clip(settings["model"]), settings, tokenizer=None)
        self.prepare, self.batch_size = self.encoder.prepare, config.index.batch_size

    @torch.inference_mode()
    def network(self, pixels_BHW3: torch.Tensor) -> None:
        embed_pixels(self.encoder.model, pixels_BHW3.permute(0, 3, 1, 2).contiguous())

    def stage(self, store: ImageStore, refs: list[str]) -> None:
        self.encoder.encode_refs(store, refs, self.batch_size)


def measure(work: Tokenize | Index, store: ImageStore, refs: list[str], rounds: int) -> list[tuple[float, float, float]]:
    """Seconds of decoding in one thread, of the network, and of both together, in each round."""
    pixels = list(image_batches(store, refs, work.prepare, work.batch_size))
    return [
        (
            seconds(lambda: [work.prepare(store.open(ref)) for ref in refs]),
            seconds(lambda: [work.network(batch) for batch in pixels]),
            seconds(lambda: work.stage(store, refs)),
        )
        for _ in range(rounds)
    ]


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    print("| stage | images | decoding alone, s | network alone, s | together, s | of the sum |\n|---|---|---|---|---|---|")
    for name, size, kind in (("640 x 480 JPEG", (640, 480), "JPEG"), ("64 x 64 PNG", (64, 64), "PNG")):
        with tempfile.TemporaryDirectory() as directory:
            refs = write_images(Path(directory), options.images, size, kind)
            for stage, work in (("`tokenize`", Tokenize()), ("`index`", Index())):
                times = measure(work, ImageStore(directory), refs, options.rounds)
                ratios = [both / (one + other) for one, other, both in times]
                decoding, network, both = (statistics.median(column) for column in zip(*times, strict=True))
                spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                print(f"| {stage} | {len(refs)} of {name} | {decoding:.2f} | {network:.2f} | {both:.2f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
