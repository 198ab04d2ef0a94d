"""Stage ``index``: embeddings of the train split and the memory bank over them."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd

from cm3leon.config import paths
from cm3leon.config.schema import Config
from cm3leon.data.loading import decoded_per_second, default_workers
from cm3leon.data.manifest import ImageStore, read_manifest
from cm3leon.models.clip import Encoder
from cm3leon.retrieval.index import BANK_COLUMNS, MemoryBank, check_documents, clear_bank, multimodal_records
from cm3leon.retrieval.vectors import CHUNK, create_embeddings, open_embeddings
from cm3leon.tracking import runs
from cm3leon.utils.world import World, world

COLUMNS = ["id", "image", "captions", "licence", "attribution", "source"]
"""Of the manifest, a fifth of its memory: with all columns two million records take 24 GB in each process."""


def embed(encoder: Encoder, records: pd.DataFrame, batch_size: int, processes: World) -> tuple[np.ndarray, np.ndarray, float]:
    """Text and image embeddings of records, float16 ``(n, d)``, and the mean CLIP score.

    They are written to ``models/index/`` as they are made. Each process makes those of its part of the records.
    """
    store, total, own = ImageStore(paths.RAW), 0.0, processes.part(len(records))
    if processes.rank == 0:
        clear_bank(paths.INDEX)
        text, image = create_embeddings(paths.INDEX, len(records), encoder.dimensions)
    processes.wait()
    if processes.rank > 0:
        text, image = open_embeddings(paths.INDEX)
    for start in range(own.start, own.stop, CHUNK):
        rows = slice(start, min(start + CHUNK, own.stop))
        part = records.iloc[rows]
        image_ND = encoder.encode_refs(store, part["image"].tolist(), batch_size)
        text_ND = encoder.encode_texts(part["caption"].tolist())
        text[rows], image[rows] = text_ND, image_ND
        total += float((text_ND * image_ND).sum())
    [total] = processes.sum([total])  # and by then all of them have written theirs
    return text, image, total / len(records)


def run(config: Config) -> dict[str, float]:
    """Write ``models/index/``.

    Returns:
        The number of documents in it, the number of train records left out, the mean CLIP score, and the recall of the search; nothing of a
        process other than the first, which builds the index.
    """
    with runs.stage_run("index", config) as run:
        with world() as processes:
            encoder = Encoder.load(paths.ENCODER).to(processes.device)
            train = read_manifest(paths.VALIDATED, "train", COLUMNS)
            records = multimodal_records(train)
            check_documents(records)
            start = time.perf_counter()
            text, image, score = embed(encoder, records, config.index.batch_size, processes)
            seconds = time.perf_counter() - start
            refs, workers = records["image"].tolist(), default_workers(encoder.device)
            [limit] = processes.sum([decoded_per_second(ImageStore(paths.RAW), refs, encoder.prepare, workers)])
        if processes.rank > 0:
            return {}
        run.log_metrics({"index/documents_per_second": len(records) / seconds, "index/decoded_per_second": limit})
        bank = MemoryBank.build(records[BANK_COLUMNS], text, image, config.index.kind, encoder.fingerprint)
        bank.save(paths.INDEX)
        metrics = {
            "documents": float(len(bank)),
            "left_out": float(len(train) - len(bank)),
            "clip_score": score,
            "recall": bank.settings["recall"],
        }
        run.log_metrics({f"index/{name}": value for name, value in metrics.items()})
    return metrics
