"""Limits of the drift check: python benchmarks/drift.py [--seeds 5] [--scenes 500] [--champion 2000] [--encoder DIR]

Paints a champion's data and trains profile small's encoder on it, or reads one from DIR, where it is kept. Compares it with data of other
seeds: of the same kind in several sizes, and changed in one way each. With CM3LEON_REAL_DATA, a directory of collections with a
manifest.csv each, also with those. Prints a row for each: median and range over the seeds, and how many of them the check stops. A second
table is of ``--draws`` random parts of data of the same kind.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from cm3leon.config import paths
from cm3leon.config.ingest_schema import FolderConfig
from cm3leon.config.profiles import load_profile
from cm3leon.config.schema import Config
from cm3leon.data.manifest import ImageStore, SourceRow, read_manifest
from cm3leon.data.packing import pack
from cm3leon.data.pixels import ImageSet
from cm3leon.data.sources import folder
from cm3leon.models.clip import Encoder
from cm3leon.registry.drift import new_data
from cm3leon.registry.shifts import Data, Shift, shifts_between
from cm3leon.scenes import source as scenes
from cm3leon.stages.validate import validate
from cm3leon.training import clip

Change = Callable[[list[SourceRow]], list[SourceRow]]
CHAMPION_SEED = 1000
NAMES = ("auc", "caption_shift", "size_shift", "license_shift", "duplicate_shift")


# --- changes of data -------------------------------------------------------------------------------------------------


def some(share: float, change: Callable[[SourceRow], SourceRow]) -> Change:
    """A change of a share of the rows, chosen at random."""

    def changed(rows: list[SourceRow]) -> list[SourceRow]:
        rng = random.Random(0)
        return [change(row) if rng.random() < share else row for row in rows]

    return changed


def repainted(change: Callable[[Image.Image], Image.Image], kind: str = "PNG") -> Callable[[SourceRow], SourceRow]:
    """A change of the image, saved as a file of a ``kind``; as JPEG with quality 30. Boxes and condition images are dropped."""

    def changed(row: SourceRow) -> SourceRow:
        assert row.image is not None
        file = io.BytesIO()
        change(Image.open(io.BytesIO(row.image))).save(file, format=kind, quality=30)
        return replace(row, image=file.getvalue(), objects=[], conditions={})

    return changed


def with_long_caption(row: SourceRow) -> SourceRow:
    """The long caption in place of the short ones."""
    return replace(row, captions=[row.long_caption or ""])


def with_captions_of_others(rows: list[SourceRow]) -> list[SourceRow]:
    """Every image has the captions of the next row."""
    return [replace(row, captions=other.captions) for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]


def with_copies(share: float, change: Callable[[SourceRow], SourceRow]) -> Change:
    """A share of the rows a second time."""

    def changed(rows: list[SourceRow]) -> list[SourceRow]:
        chosen = random.Random(0).sample(rows, int(share * len(rows)))
        return rows + [replace(change(row), key=f"{row.key}-copy", edited_from=None) for row in chosen]

    return changed


JPEG = repainted(lambda image: image, "JPEG")
CHANGES: dict[str, tuple[dict[str, object], Change]] = {
    "letters in 20 % of the scenes": ({"letters": 0.2}, list),
    "one object a scene instead of up to three": ({"max_objects": 1, "grid": 0}, list),
    "long captions in 20 %": ({}, some(0.2, with_long_caption)),
    "long captions in all": ({}, some(1, with_long_caption)),
    "captions of another image": ({}, with_captions_of_others),
    "another license in 15 %": ({}, some(0.15, lambda row: replace(row, licence="CC-BY-4.0"))),
    "another license in 40 %": ({}, some(0.4, lambda row: replace(row, licence="CC-BY-4.0"))),
    "twice the size in 20 %": ({}, some(0.2, repainted(lambda image: image.resize((128, 128))))),
    "cut to 64 x 48 in all": ({}, some(1, repainted(lambda image: image.crop((0, 8, 64, 56))))),
    "JPEG, quality 30, in all": ({}, some(1, JPEG)),
    "blurred by a pixel in all": ({}, some(1, repainted(lambda image: image.filter(ImageFilter.GaussianBlur(1))))),
    "blurred by three pixels in all": ({}, some(1, repainted(lambda image: image.filter(ImageFilter.GaussianBlur(3))))),
    "gray in all": ({}, some(1, repainted(lambda image: image.convert("L")))),
    "20 % copies": ({}, with_copies(0.2, lambda row: row)),
    "20 % copies as JPEG": ({}, with_copies(0.2, JPEG)),
}
"""What changed -> parameters of the scenes, and the change of their rows."""


# --- the comparison --------------------------------------------------------------------------------------------------


def painted(config: Config, count: int, seed: int, **changes: object) -> list[SourceRow]:
    """Scenes of profile small."""
    return list(scenes.rows(config.ingest.shapes.model_copy(update={"count": count, "seed": seed, **changes}), Path()))


def project(rows: Iterable[SourceRow], config: Config, root: Path) -> Path:
    """The rows as the outputs of ``ingest`` and ``validate`` under ``root``; returns ``root``."""
    (root / paths.RAW).mkdir(parents=True)
    pack(rows, root / paths.RAW, config.ingest.shard_megabytes)
    any_share = config.validate_.model_copy(update={"max_rejected_rate": 1.0})  # what is rejected is not compared
    validate(root / paths.RAW, root / paths.VALIDATED, root / paths.DATA_DOCS, any_share, config.seed)
    return root


def trained(config: Config, root: Path) -> Encoder:
    """The encoder of profile small, trained on a project's data."""
    train = read_manifest(root / paths.VALIDATED, "train")
    images = ImageSet(ImageStore(root / paths.RAW), train["image"].tolist(), config.encoder.image_size)
    return clip.train(config.encoder, images, train["captions"].tolist(), config.seed)


class Comparison:
    """Compares rows with the champion's data, and prints a row of the table."""

    def __init__(self, config: Config, champion: Path, encoder: Encoder) -> None:
        self.config, self.encoder = config, encoder
        self.old = self._data(champion)

    def _data(self, root: Path) -> Data:
        return new_data(self.encoder, self.config.drift.sample, self.config.seed, root)

    def shifts(self, rows: Iterable[SourceRow]) -> list[Shift]:
        """What the drift check finds."""
        with tempfile.TemporaryDirectory() as folder:
            new = self._data(project(rows, self.config, Path(folder)))
        return shifts_between(self.config.drift, self.old, new, self.config.seed)

    def print(self, what: str, samples: Sequence[list[SourceRow]]) -> None:
        """Compare samples of one kind, and print what was found."""
        found = [{shift.name: shift for shift in self.shifts(rows)} for rows in samples]
        stopped = sum(not all(shift.passed for shift in shifts.values()) for shifts in found)
        cells = [
            spread([shifts[name].value or 0.0 for shifts in found], not all(shifts[name].passed for shifts in found)) for name in NAMES
        ]
        print(f"| {what} | {' | '.join(cells)} | {stopped} of {len(found)} |", flush=True)

    def print_draws(self, rows: list[SourceRow], sizes: Sequence[int], draws: int) -> None:
        """Compare random parts of one sample, of ``sizes`` documents; print the 99 % quantile and the largest value of each comparison."""
        with tempfile.TemporaryDirectory() as folder:
            pool = self._data(project(rows, self.config, Path(folder)))
        rng = np.random.default_rng(0)
        print("\n| documents | comparison | 99 % | largest | limit + chance | stopped |\n|---|---|---|---|---|---|")
        for size in sizes:
            drawn = [shifts_between(self.config.drift, self.old, part(pool, size, rng), 0) for _ in range(draws)]
            for shifts in zip(*drawn, strict=True):
                values = [shift.value or 0.0 for shift in shifts]
                cells = f"{np.quantile(values, 0.99):.3f} | {max(values):.3f} | {shifts[0].limit + shifts[0].chance:.3f}"
                stopped = sum(not shift.passed for shift in shifts)
                if shifts[0].name in ("auc", "caption_shift"):
                    print(f"| {size} | {shifts[0].name} | {cells} | {stopped} of {draws} |", flush=True)


def part(data: Data, size: int, rng: np.random.Generator) -> Data:
    """``size`` documents chosen at random."""
    chosen, seen = rng.permutation(len(data.ids))[:size], rng.permutation(len(data.embeddings))[:size]
    return data._replace(
        ids=[data.ids[row] for row in chosen],
        licenses=data.licenses.iloc[chosen],
        lengths=data.lengths[chosen],
        sides=None,
        duplicates=None,
        embeddings=data.embeddings[seen],
    )


def spread(values: Sequence[float], stopped: bool) -> str:
    """Median and range, bold where it stopped a run."""
    text = f"{statistics.median(values):.2f}" + (f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else "")
    return f"**{text}**" if stopped else text


def main(seeds: int, count: int, champion: int, draws: int, kept: Path | None) -> None:
    """Print both tables."""
    config = load_profile("small")
    with tempfile.TemporaryDirectory() as folder_of_champion:
        root = project(painted(config, champion, CHAMPION_SEED), config, Path(folder_of_champion))
        if kept and kept.is_dir():
            encoder = Encoder.load(kept)
        else:
            encoder = trained(config, root)
            if kept:
                encoder.save(kept)
        comparison = Comparison(config, root, encoder)
        print(f"| new data | {' | '.join(NAMES)} | stopped |\n|---|{'---|' * (len(NAMES) + 1)}")
        for size in (count // 5, count, champion):
            comparison.print(f"the same kind, {size} scenes", [painted(config, size, seed) for seed in range(seeds)])
        for name, (parameters, change) in CHANGES.items():
            comparison.print(name, [change(painted(config, count, seed, **parameters)) for seed in range(seeds)])
        if collections := os.environ.get("CM3LEON_REAL_DATA"):
            for manifest in sorted(Path(collections).glob("*/manifest.csv")):
                name = manifest.parent.name
                comparison.print(f"another collection: {name}", [list(folder.rows(FolderConfig(), manifest.parent))])
        comparison.print_draws(painted(config, champion, 0), (25, 100, 400, 1600), draws)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--champion", type=int, default=2000, help="scenes of the champion's data")
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--encoder", type=Path, help="read the encoder from this directory, or keep it there")
    options = parser.parse_args()
    main(options.seeds, options.scenes, options.champion, options.draws, options.encoder)
