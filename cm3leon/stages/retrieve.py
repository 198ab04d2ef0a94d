"""Stage ``retrieve``: the neighbor table. Every document is a query, whatever its split; neighbors come from the train split."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cm3leon.config import paths
from cm3leon.config.schema import Config, RetrieveConfig
from cm3leon.data.manifest import SPLITS, ImageStore, read_manifest
from cm3leon.models.clip import Encoder
from cm3leon.retrieval import strategy
from cm3leon.retrieval.index import MemoryBank, document_vectors
from cm3leon.retrieval.strategy import Neighbor
from cm3leon.stages.index import multimodal
from cm3leon.tracking import runs
from cm3leon.utils.device import default_device
from cm3leon.utils.progress import progress

FILE = "neighbours.parquet"
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("neighbours", pa.list_(pa.string())),  # ids of train documents, those found by text first
        ("scores", pa.list_(pa.float32())),  # cosine of the query's text or image with the neighbor
        ("modalities", pa.list_(pa.string())),  # "text" or "image": what of the query found it
        ("random", pa.list_(pa.string())),  # as many train documents drawn at random under the same rules, for comparison
    ]
)
CHUNK = 1024


def own_vectors(encoder: Encoder, bank: MemoryBank, rows: pd.DataFrame, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Text and image vectors of the rows, (n, d) each: from the bank where they are in it, else encoded."""
    known = own >= 0
    text = np.zeros((len(rows), bank.settings["dimensions"]), dtype=np.float32)
    image = np.zeros_like(text)
    text[known], image[known] = bank.text[own[known]], bank.image[own[known]]
    text[~known] = encoder.encode_texts(rows["caption"][~known].tolist())
    image[~known] = encoder.encode_refs(ImageStore(paths.RAW), rows["image"][~known].tolist())
    return text, image


def neighbors(
    encoder: Encoder, bank: MemoryBank, rows: pd.DataFrame, config: RetrieveConfig, seed: int
) -> tuple[list[list[Neighbor]], list[list[int]]]:
    """Neighbors of documents by their caption, some of its words dropped, and by their image; and positions of as many random ones."""
    own = rows["id"].map(bank.position).fillna(-1).to_numpy(dtype=np.int64)
    text, image = own_vectors(encoder, bank, rows, own)
    whole = document_vectors(text, image)
    found: list[list[Neighbor]] = []
    others: list[list[int]] = []
    with progress("retrieving", len(rows), "documents") as meter:
        for start in range(0, len(rows), CHUNK):
            part = rows.iloc[start : start + CHUNK]
            texts = [strategy.drop_words(text, config.query_drop, seed, key) for text, key in zip(part["caption"], part["id"], strict=True)]
            chunk = slice(start, start + CHUNK)
            query = {"whole": whole[chunk], "own": own[chunk]}
            found += strategy.find(bank, config, text=encoder.encode_texts(texts), image=image[chunk], **query)
            keys = [f"{seed}/{name}" for name in part["id"]]
            others += strategy.draw_random(bank, config, **query, counts=[len(group) for group in found[chunk]], keys=keys)
            meter.advance(len(part))
    return found, others


def to_table(ids: list[str], found: list[list[Neighbor]], others: list[list[int]], bank: MemoryBank) -> pa.Table:
    """The neighbor table."""
    names = bank.documents["id"].tolist()
    return pa.table(
        {
            "id": ids,
            "neighbours": [[names[n.position] for n in group] for group in found],
            "scores": [[n.score for n in group] for group in found],
            "modalities": [[n.modality for n in group] for group in found],
            "random": [[names[position] for position in group] for group in others],
        },
        schema=SCHEMA,
    )


def run(config: Config) -> dict[str, float]:
    """Writes ``data/neighbours/neighbours.parquet``; returns how well the train documents are served, and val and test beside them."""
    with runs.stage_run("retrieve", config) as run:
        encoder = Encoder.load(paths.ENCODER).to(default_device())
        bank = MemoryBank.load(paths.INDEX)
        bank.check_encoder(encoder.fingerprint)
        ids: list[str] = []
        found: list[list[Neighbor]] = []
        others: list[list[int]] = []
        figures: dict[str, float] = {}
        for split in SPLITS:
            rows = multimodal(read_manifest(paths.VALIDATED, split, ["id", "image", "captions"]))
            part, drawn = neighbors(encoder, bank, rows, config.retrieve, config.seed)
            figures |= {f"{split}_{name}": value for name, value in strategy.coverage(part, config.retrieve).items()}
            ids += rows["id"].tolist()
            found += part
            others += drawn
        paths.NEIGHBORS.mkdir(parents=True, exist_ok=True)
        pq.write_table(to_table(ids, found, others, bank), paths.NEIGHBORS / FILE)
        run.log_metrics({f"retrieve/{name}": value for name, value in figures.items()})
    return figures
