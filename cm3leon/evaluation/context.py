"""What the measurements of all tasks share: the model, the test records and how they are sampled, and the evaluation record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from cm3leon.config.schema import Config
from cm3leon.data.images import fit_square
from cm3leon.data.manifest import ImageStore, first_caption
from cm3leon.evaluation.pictures import Pictures
from cm3leon.evaluation.record import Record, digest, keyed
from cm3leon.generation.generator import Generator, Images
from cm3leon.generation.results import GeneratedText
from cm3leon.models.clip import Encoder
from cm3leon.scenes import composition
from cm3leon.sequence.tasks import Fields, is_filled
from cm3leon.utils.world import ALONE, World

Sheet = list[tuple[Image.Image, str]]
"""Images with their captions, for a contact sheet."""
TOGETHER = 1024
"""Requests in one call of the generator."""


@dataclass(frozen=True)
class Evaluation:
    """A model, the test records, and the evaluation record to which scores are added.

    Several processes measure alike, each with the whole model; what takes long, generation, they divide among themselves.

    Attributes:
        encoder: the CLIP model that measures; the generator has one of its own, which ranks candidates.
        test: rows of the manifest, of the test split.
    """

    config: Config
    generator: Generator
    encoder: Encoder
    store: ImageStore
    test: pd.DataFrame
    record: Record
    processes: World = ALONE

    def rows(
        self,
        task: str,
        columns: Sequence[str],
        usable: Callable[[Any], bool] = lambda row: True,
        values: Callable[[Any], Fields] | None = None,
    ) -> list[Any]:
        """Up to ``evaluate.tasks`` records for a task, sampled by the seed; the contract states how many were too long.

        Args:
            columns: manifest columns that must be filled.
            usable: a further condition on a record.
            values: fields of the task's template for a record; records that do not fit in the context are left out.
        """
        # 1. Records that have what the task needs, and fit in the context.
        found = [row for row in self.test.itertuples() if all(is_filled(getattr(row, column)) for column in columns) and usable(row)]
        fitting = [row for row in found if values is None or self.generator.fits(task, values(row))]
        self.record.contract.setdefault("tasks", {})[task] = {"count": 0, "too_long": len(found) - len(fitting)}
        if not fitting:
            self.say(f"{task}: not measured, no test record has the columns it needs and fits in the context")

        # 2. A sample of them, in the manifest's order.
        order = np.random.default_rng(self.config.evaluate.seed).permutation(len(fitting))[: self.config.evaluate.tasks]
        return [fitting[int(number)] for number in sorted(order)]

    def say(self, message: str) -> None:
        """Print a message, once."""
        if self.processes.rank == 0:
            print(message, flush=True)

    def images(self, refs: Sequence[str]) -> list[Image.Image]:
        """Stored images, cropped and resized to the image tokenizer's square."""
        return [fit_square(self.store.open(ref), self.generator.image_size) for ref in refs]

    def stored(self, refs: Sequence[str]) -> Pictures:
        """As :meth:`images`, decoded where they are read: for many."""
        return Pictures(len(refs), lambda rows: self.images(refs[rows]))

    def decoded(self, codes: np.ndarray) -> Pictures:
        """Images of codes (n, tokens_per_image)."""
        return Pictures(len(codes), lambda rows: self.generator.decode(codes[rows]))

    def reconstructions(self, images: Sequence[Image.Image]) -> Pictures:
        """Images encoded and decoded by the image tokenizer: the ceiling of scores of generated images."""
        return self.decoded(self.generator.encode(images))

    def generate_images(self, task: Callable[..., Images], *inputs: Sequence[Any], **settings: Any) -> Pictures:
        """The best image of each request; what is kept of it is its codes.

        Args:
            task: method of the generator.
            inputs: its lists, of one length.
        """
        codes = [np.zeros((0, self.generator.image_tokenizer.spec.tokens_per_image), np.int64)]
        for rows in self._own_rows(len(inputs[0])):
            generated = task(*(values[rows] for values in inputs), seed=self.config.evaluate.seed, **settings)
            codes.append(np.stack([images[0].codes for images in generated]))
        return self.decoded(self.processes.concatenate(torch.from_numpy(np.concatenate(codes))).numpy())

    def generate_texts(self, task: Callable[..., list[GeneratedText]], *inputs: Sequence[Any], **settings: Any) -> list[str]:
        """The text of each request; arguments as of :meth:`generate_images`."""
        texts: list[str] = []
        for rows in self._own_rows(len(inputs[0])):
            texts += [text.text for text in task(*(values[rows] for values in inputs), **settings)]
        return [text for own in self.processes.gather(texts) for text in own]

    def _own_rows(self, count: int) -> Iterator[slice]:
        """This process's part of ``count`` rows, :data:`TOGETHER` at a time."""
        own = self.processes.part(count)
        for start in range(own.start, own.stop, TOGETHER):
            yield slice(start, min(start + TOGETHER, own.stop))

    def add(self, name: str, ids: Sequence[str], values: Sequence[float] | np.ndarray, share: bool = False) -> None:
        """Add a score that is a mean over records, with its interval and outcomes; ``share`` as in :meth:`Record.add`."""
        self.record.add(name, keyed(ids, values), self.config.evaluate.bootstrap, self.config.evaluate.seed, share)

    def add_composition(self, name: str, ids: Sequence[str], captions: Sequence[str], images: Sequence[Image.Image]) -> None:
        """Add the composition accuracy of images whose captions describe scenes; nothing if no caption does."""
        if right := composition.all_right(composition.check_images(captions, images)):
            self.add(name, [ids[position] for position in right], list(right.values()), share=True)

    def calibrate(self, name: str, values: Sequence[float] | np.ndarray) -> None:
        """Add a calibration, the mean of the same metric for a baseline or a ceiling; nothing if there are no values."""
        if len(values):
            self.record.calibration[name] = float(np.mean(values))

    def asked(self, task: str, what: Any) -> None:
        """Add a digest of what a task was asked to the contract."""
        self.record.contract["tasks"][task] |= {"asked": digest(what), "count": len(what)}


def sample_rows(manifest: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """``count`` rows, or all if there are fewer, sampled by the seed, in the manifest's order."""
    order = np.random.default_rng(seed).permutation(len(manifest))[:count]
    return manifest.iloc[np.sort(order)]


def is_scene(row: Any) -> bool:
    """True if the record's first caption describes a scene, so that images of it can be checked by reading them back."""
    return composition.parse_caption(first_caption(row.captions)) is not None
