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
from cm3leon.data.tokens import CONDITION_PREFIX, Document, write_tokens
from cm3leon.models.vqgan import ImageTokenizer
from cm3leon.sequence.tasks import CONDITIONS, condition_key
from cm3leon.sequence.text_tokenizer import TextTokenizer
from cm3leon.tracking import runs
from cm3leon.utils.device import default_device
from cm3leon.utils.images import to_channels_first
from cm3leon.utils.progress import Meter, progress


def encode_images(refs: Sequence[str], store: ImageStore, tokenizer: ImageTokenizer) -> np.ndarray:
    """Codes (n, tokens_per_image) of stored images, each cropped and resized to the tokenizer's square."""
    pixels = np.stack([np.asarray(fit_square(store.open(ref), tokenizer.spec.image_size)) for ref in refs])
    return tokenizer.encode(to_channels_first(torch.from_numpy(pixels), next(tokenizer.parameters()).device)).cpu().numpy()


def documents(
    manifest: pd.DataFrame, store: ImageStore, images: ImageTokenizer, texts: TextTokenizer, batch_size: int, meter: Meter
) -> Iterator[Document]:
    """The tokenized documents of a manifest, computed in batches."""
    for start in range(0, len(manifest), batch_size):
        batch = manifest.iloc[start : start + batch_size]
        codes = encode_images(batch["image"].tolist(), store, images)
        encoded = iter(texts.encode_many([caption for captions in batch["captions"] for caption in captions]))
        for document_id, own_codes, captions in zip(batch["id"], codes, batch["captions"], strict=True):
            yield Document(document_id, own_codes, [np.asarray(next(encoded), dtype=np.uint32) for _ in captions])
        meter.advance(len(batch))


def condition_documents(
    manifest: pd.DataFrame, store: ImageStore, images: ImageTokenizer, batch_size: int, meter: Meter
) -> Iterator[Document]:
    """The tokenized condition images of the kinds that tasks use, computed in batches."""
    found = [
        (condition_key(document_id, item["kind"]), item["image"])
        for document_id, items in zip(manifest["id"], manifest["conditions"], strict=True)
        for item in items
        if item["kind"] in CONDITIONS
    ]
    for start in range(0, len(found), batch_size):
        batch = found[start : start + batch_size]
        for (key, _), codes in zip(batch, encode_images([ref for _, ref in batch], store, images), strict=True):
            yield Document(key, codes, [])
        meter.advance(len(batch))


def run(config: Config) -> dict[str, float]:
    """Write ``data/tokens/``: the documents of each split, and their condition images in ``conditions-SPLIT``.

    Returns:
        The numbers of documents, condition images and image tokens.
    """
    images, texts = ImageTokenizer.load(paths.IMAGE_TOKENIZER, default_device()), TextTokenizer.load(paths.TEXT_TOKENIZER)
    store = ImageStore(paths.RAW)
    manifest = read_manifest(paths.VALIDATED, columns=["id", "image", "captions", "conditions", "split"])
    batch_size, layout = config.tokenize.batch_size, (images.spec.tokens_per_image, config.tokenize.shard_documents)
    expected = len(manifest) + sum(map(len, manifest["conditions"]))
    written, conditions = 0, 0
    with runs.stage_run("tokenize", config) as run, progress("tokenizing", expected, "images") as meter:
        for split in SPLITS:
            rows = manifest[manifest["split"] == split]
            written += write_tokens(paths.TOKENS, split, documents(rows, store, images, texts, batch_size, meter), *layout)
            of_conditions = condition_documents(rows, store, images, batch_size, meter)
            conditions += write_tokens(paths.TOKENS, CONDITION_PREFIX + split, of_conditions, *layout)
        metrics = {"documents": written, "conditions": conditions, "image_tokens": (written + conditions) * images.spec.tokens_per_image}
        run.log_metrics({f"tokenize/{name}": value for name, value in metrics.items()})
    return {name: float(value) for name, value in metrics.items()}
