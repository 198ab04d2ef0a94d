"""Stage ``tokenize``: images to codes and captions to ids, into memory-mapped Arrow shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.data.images import fit_square
from cm3leon.data.manifest import SPLITS, ImageStore, read_manifest
from cm3leon.data.tokens import CONDITIONS_OF, Document, write_tokens
from cm3leon.models.vqgan import ImageTokenizer
from cm3leon.sequence.tasks import CONDITIONS, condition_key
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.tracking import runs
from cm3leon.utils.device import default_device
from cm3leon.utils.images import to_channels_first
from cm3leon.utils.progress import Meter, progress


def codes_of(refs: Sequence[str], store: ImageStore, images: ImageTokenizer) -> np.ndarray:
    """Codes (n, tokens_per_image) of stored images, each fitted to the tokenizer's square."""
    pixels = np.stack([np.asarray(fit_square(store.open(ref), images.spec.image_size)) for ref in refs])
    return images.encode(to_channels_first(torch.from_numpy(pixels), next(images.parameters()).device)).cpu().numpy()


def documents(
    manifest: pd.DataFrame, store: ImageStore, images: ImageTokenizer, texts: TextTokenizer, batch_size: int, meter: Meter
) -> Iterator[Document]:
    """Tokenize a manifest batch by batch."""
    for start in range(0, len(manifest), batch_size):
        part = manifest.iloc[start : start + batch_size]
        codes = codes_of(part["image"].tolist(), store, images)
        encoded = iter(texts.encode_many([caption for captions in part["captions"] for caption in captions]))
        for name, row_codes, captions in zip(part["id"], codes, part["captions"], strict=True):
            yield Document(name, row_codes, [np.asarray(next(encoded), dtype=np.uint32) for _ in captions])
        meter.advance(len(part))


def conditions(manifest: pd.DataFrame, store: ImageStore, images: ImageTokenizer, batch_size: int, meter: Meter) -> Iterator[Document]:
    """Tokenize the condition images of the kinds that tasks know."""
    found = [
        (condition_key(name, item["kind"]), item["image"])
        for name, items in zip(manifest["id"], manifest["conditions"], strict=True)
        for item in items
        if item["kind"] in CONDITIONS
    ]
    for start in range(0, len(found), batch_size):
        part = found[start : start + batch_size]
        for (key, _), codes in zip(part, codes_of([ref for _, ref in part], store, images), strict=True):
            yield Document(key, codes, [])
        meter.advance(len(part))


def run(config: Config) -> dict[str, float]:
    """Writes ``data/tokens/``: documents by split, and condition images in ``conditions-SPLIT``; returns how many there are, and tokens."""
    images, texts = ImageTokenizer.load(paths.IMAGE_TOKENIZER, default_device()), TextTokenizer.load(paths.TEXT_TOKENIZER)
    store = ImageStore(paths.RAW)
    manifest = read_manifest(paths.VALIDATED, columns=["id", "image", "captions", "conditions", "split"])
    count, conditioned, batch_size = 0, 0, config.tokenize.batch_size
    expected = len(manifest) + sum(map(len, manifest["conditions"]))
    with runs.stage_run("tokenize", config) as run, progress("tokenizing", expected, "images") as meter:
        for split in SPLITS:
            part = manifest[manifest["split"] == split]
            layout = images.spec.tokens_per_image, config.tokenize.shard_documents
            count += write_tokens(paths.TOKENS, split, documents(part, store, images, texts, batch_size, meter), *layout)
            conditioned += write_tokens(paths.TOKENS, CONDITIONS_OF + split, conditions(part, store, images, batch_size, meter), *layout)
        figures = {"documents": count, "conditions": conditioned, "image_tokens": (count + conditioned) * images.spec.tokens_per_image}
        run.log_metrics({f"tokenize/{k}": v for k, v in figures.items()})
    return {name: float(value) for name, value in figures.items()}
