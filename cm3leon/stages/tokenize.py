"""Stage ``tokenize``: images to codes and captions to ids, into memory-mapped Arrow shards, which the processes divide among themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.data.loading import Square, decoded_per_second, default_workers, image_batches
from cm3leon.data.manifest import SPLITS, ImageStore, read_manifest
from cm3leon.data.tokens import CONDITION_PREFIX, Document, clear_tokens, write_tokens
from cm3leon.models.pixels import to_channels_first
from cm3leon.models.vqgan import ImageTokenizer
from cm3leon.sequence.tasks import CONDITIONS, condition_key
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.tracking import runs
from cm3leon.training.precision import has_native_bf16
from cm3leon.utils.progress import Meter, progress
from cm3leon.utils.world import World, world

MIN_AGREEMENT = 0.995
"""Least share of the codes that must be the same for the encoder to compute in bfloat16."""
COMPARED = 256
"""Images whose codes are compared."""


@dataclass(frozen=True)
class ImageReader:
    """Codes of stored images, each cropped and resized to the tokenizer's square; images are decoded ahead of the tokenizer."""

    store: ImageStore
    tokenizer: ImageTokenizer
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    meter: Meter

    def codes(self, refs: Sequence[str]) -> Iterator[np.ndarray]:
        """The codes (tokens_per_image) of each image."""
        square = Square(self.tokenizer.spec.image_size)
        for pixels in image_batches(self.store, refs, square, self.batch_size, default_workers(self.device)):
            codes = self.tokenizer.encode(to_channels_first(pixels, self.device), self.dtype).cpu().numpy()
            self.meter.advance(len(pixels))
            yield from codes


def choose_dtype(tokenizer: ImageTokenizer, pixels: Iterable[torch.Tensor], device: torch.device) -> tuple[torch.dtype, float]:
    """The dtype of the encoder's matrix products for images like these: bfloat16 if :data:`MIN_AGREEMENT` of their codes stay the same.

    Args:
        pixels: batches of uint8 ``(B, H, W, 3)``.

    Returns:
        The dtype, and the share of the codes that are the same in bfloat16 as in float32.
    """
    same = []
    for pixels_BHW3 in pixels:
        images_B3HW = to_channels_first(pixels_BHW3, device)
        same.append(tokenizer.encode(images_B3HW, torch.bfloat16) == tokenizer.encode(images_B3HW))
    share = torch.cat(same).double().mean().item()
    return (torch.bfloat16 if share >= MIN_AGREEMENT else torch.float32), share


def documents(manifest: pd.DataFrame, images: ImageReader, texts: TextTokenizer) -> Iterator[Document]:
    """The tokenized documents of a manifest, computed in batches."""
    all_codes = images.codes(manifest["image"].tolist())
    for start in range(0, len(manifest), images.batch_size):
        batch = manifest.iloc[start : start + images.batch_size]
        encoded = iter(texts.encode_many([caption for captions in batch["captions"] for caption in captions]))
        for document_id, captions in zip(batch["id"], batch["captions"], strict=True):
            yield Document(document_id, next(all_codes), [np.asarray(next(encoded), dtype=np.uint32) for _ in captions])


def condition_images(manifest: pd.DataFrame) -> list[tuple[str, str]]:
    """Key and reference of the condition images of the kinds that tasks use."""
    return [
        (condition_key(document_id, item["kind"]), item["image"])
        for document_id, items in zip(manifest["id"], manifest["conditions"], strict=True)
        for item in items
        if item["kind"] in CONDITIONS
    ]


def condition_documents(found: Sequence[tuple[str, str]], images: ImageReader) -> Iterator[Document]:
    """The tokenized condition images of keys and references."""
    for (key, _), codes in zip(found, images.codes([ref for _, ref in found]), strict=True):
        yield Document(key, codes, [])


def own_rows(count: int, shard_documents: int, processes: World) -> list[int]:
    """The rows of ``count`` that this process writes: whole shards, which are dealt to the processes in turn."""
    return [row for row in range(count) if row // shard_documents % processes.size == processes.rank]


def run(config: Config) -> dict[str, float]:
    """Write ``data/tokens/``: the documents of each split, and their condition images in ``conditions-SPLIT``.

    Returns:
        The numbers of documents, condition images and image tokens.
    """
    with world() as processes, runs.stage_run("tokenize", config) as run:
        return tokenize(config, processes, run)


def tokenize(config: Config, processes: World, run: runs.Run) -> dict[str, float]:
    """As :func:`run`; the shards are the same for any number of processes."""
    # 1. What is tokenized, and the part of it that is this process's.
    device = processes.device
    tokenizer, texts = ImageTokenizer.load(paths.IMAGE_TOKENIZER, device), TextTokenizer.load(paths.TEXT_TOKENIZER)
    store = ImageStore(paths.RAW)
    manifest = read_manifest(paths.VALIDATED, columns=["id", "image", "captions", "conditions", "split"])
    batch_size, layout = config.tokenize.batch_size, (tokenizer.spec.tokens_per_image, config.tokenize.shard_documents)
    refs = [*manifest["image"], *(ref for _, ref in condition_images(manifest))]
    rows, conditions = {}, {}
    for split in SPLITS:
        whole = manifest[manifest["split"] == split]
        rows[split] = whole.iloc[own_rows(len(whole), layout[1], processes)]
        pairs = condition_images(whole)
        conditions[split] = [pairs[row] for row in own_rows(len(pairs), layout[1], processes)]

    # 2. The encoder's dtype: the processes compare the same images, and take bfloat16 if all of them may.
    square, dtype = Square(tokenizer.spec.image_size), torch.float32
    if has_native_bf16(device):
        compared = refs[:: max(1, len(refs) // COMPARED)][:COMPARED]
        dtype, share = choose_dtype(tokenizer, image_batches(store, compared, square, batch_size), device)
        run.log_metrics({"tokenize/bf16_agreement": share})
    if processes.max(int(dtype == torch.float32)):
        dtype = torch.float32

    # 3. Shards.
    if processes.rank == 0:
        clear_tokens(paths.TOKENS)
    processes.wait()
    documents_written = conditions_written = 0.0
    total = sum(map(len, rows.values())) + sum(map(len, conditions.values()))
    with progress("tokenizing", total, "images") as meter:
        images = ImageReader(store, tokenizer, batch_size, device, dtype, meter)
        for split in SPLITS:
            numbers = (processes.rank, processes.size)
            documents_written += write_tokens(paths.TOKENS, split, documents(rows[split], images, texts), *layout, *numbers)
            found = condition_documents(conditions[split], images)
            conditions_written += write_tokens(paths.TOKENS, CONDITION_PREFIX + split, found, *layout, *numbers)
        rate = meter.rate

    # 4. Counts and rates of all processes.
    limit = decoded_per_second(store, refs, square, default_workers(device))
    rate, limit, documents_written, conditions_written = processes.sum([rate, limit, documents_written, conditions_written])
    run.log_metrics({"tokenize/images_per_second": rate, "tokenize/decoded_per_second": limit})
    metrics = {
        "documents": documents_written,
        "conditions": conditions_written,
        "image_tokens": (documents_written + conditions_written) * tokenizer.spec.tokens_per_image,
    }
    run.log_metrics({f"tokenize/{name}": value for name, value in metrics.items()})
    return metrics
