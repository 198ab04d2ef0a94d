"""Stage ``tokenize``: images to codes and captions to ids, into memory-mapped Arrow shards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

from cm3leon import paths, tracking
from cm3leon.config import Config
from cm3leon.data.images import fit_square
from cm3leon.data.manifest import ImageStore, read_manifest
from cm3leon.data.tokens import Document, write_tokens
from cm3leon.progress import Meter, progress
from cm3leon.stages.common import device
from cm3leon.tokenizers.image import ImageTokenizer, to_float
from cm3leon.tokenizers.text import TextTokenizer

SPLITS = ("train", "val", "test")


def documents(
    manifest: pd.DataFrame, store: ImageStore, images: ImageTokenizer, texts: TextTokenizer, batch_size: int, meter: Meter
) -> Iterator[Document]:
    """Tokenise a manifest batch by batch."""
    where = next(images.parameters()).device
    for start in range(0, len(manifest), batch_size):
        part = manifest.iloc[start : start + batch_size]
        pixels = np.stack([np.asarray(fit_square(store.open(ref), images.spec.image_size)) for ref in part["image"]])
        codes = images.encode(to_float(torch.from_numpy(pixels), where)).cpu().numpy()
        encoded = iter(texts.encode_many([caption for captions in part["captions"] for caption in captions]))
        for name, row_codes, captions in zip(part["id"], codes, part["captions"], strict=True):
            yield Document(name, row_codes, [np.asarray(next(encoded), dtype=np.uint32) for _ in captions])
        meter.advance(len(part))


def run(config: Config) -> dict[str, float]:
    """Writes ``data/tokens/``; returns the number of documents and tokens."""
    images, texts = ImageTokenizer.load(paths.IMAGE_TOKENIZER, device()), TextTokenizer.load(paths.TEXT_TOKENIZER)
    store = ImageStore(paths.RAW)
    manifest = read_manifest(paths.VALIDATED, columns=["id", "image", "captions", "split"])
    count = 0
    with tracking.stage_run("tokenize", config) as run, progress("tokenising", len(manifest), "documents") as meter:
        for split in SPLITS:
            part = manifest[manifest["split"] == split]
            stream = documents(part, store, images, texts, config.tokenize.batch_size, meter)
            count += write_tokens(paths.TOKENS, split, stream, images.spec.tokens_per_image, config.tokenize.shard_documents)
        figures = {"documents": float(count), "image_tokens": float(count * images.spec.tokens_per_image)}
        run.log_metrics({f"tokenize/{k}": v for k, v in figures.items()})
    return figures
