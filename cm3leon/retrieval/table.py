"""The neighbor table that training reads: the retrieved documents of every document of the collection, and random ones for comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cm3leon.config.schema import RetrieveConfig
from cm3leon.retrieval.index import MemoryBank, document_vectors
from cm3leon.retrieval.strategy import Neighbor, drop_words, find, sample_random
from cm3leon.utils.progress import progress

FILE = "neighbours.parquet"
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("neighbours", pa.list_(pa.string())),  # ids of train documents, those found by text first
        ("scores", pa.list_(pa.float32())),  # cosine of the query's text or image with the neighbor
        ("modalities", pa.list_(pa.string())),  # "text" or "image": the modality of the query that found it
        ("random", pa.list_(pa.string())),  # as many train documents, sampled at random under the same rules
    ]
)
CHUNK = 1024
"""Queries searched together."""


@dataclass
class NeighborTable:
    """The table while it grows.

    Attributes:
        encode_texts: of the bank's encoder.
        seed: of the dropped words and of the random documents.
        ids: the queries, one a row.
        found: their retrieved documents.
        random: bank positions of documents sampled at random, as many as were retrieved.
    """

    bank: MemoryBank
    encode_texts: Callable[[Sequence[str]], np.ndarray]
    config: RetrieveConfig
    seed: int
    ids: list[str] = field(default_factory=list)
    found: list[list[Neighbor]] = field(default_factory=list)
    random: list[list[int]] = field(default_factory=list)

    def add(self, records: pd.DataFrame, text: np.ndarray, image: np.ndarray) -> list[list[Neighbor]]:
        """Retrieve for records, by their captions with some words dropped and by their images; returns what was found.

        Args:
            records: rows with ``id`` and ``caption``.
            text, image: float32 ``(n, d)`` unit vectors of the whole captions and of the images.
        """
        bank, config, seed = self.bank, self.config, self.seed
        whole, own = document_vectors(text, image), bank.positions_of(records["id"])
        first = len(self.found)
        with progress("retrieving", len(records), "documents") as meter:
            for start in range(0, len(records), CHUNK):
                rows = slice(start, start + CHUNK)
                ids = records["id"].iloc[rows].tolist()
                captions = records["caption"].iloc[rows].tolist()
                queries = [drop_words(caption, config.query_drop, seed, name) for caption, name in zip(captions, ids, strict=True)]
                found = find(bank, config, text=self.encode_texts(queries), image=image[rows], whole=whole[rows], own=own[rows])
                counts = [len(neighbors) for neighbors in found]
                keys = [f"{seed}/{name}" for name in ids]
                self.random += sample_random(bank, config, whole=whole[rows], own=own[rows], counts=counts, keys=keys)
                self.found += found
                self.ids += ids
                meter.advance(len(ids))
        return self.found[first:]

    def to_arrow(self) -> pa.Table:
        """The table in :data:`SCHEMA`, with bank positions replaced by ids."""
        names = self.bank.documents["id"].tolist()
        return pa.table(
            {
                "id": self.ids,
                "neighbours": [[names[neighbor.position] for neighbor in neighbors] for neighbors in self.found],
                "scores": [[neighbor.score for neighbor in neighbors] for neighbors in self.found],
                "modalities": [[neighbor.modality for neighbor in neighbors] for neighbors in self.found],
                "random": [[names[position] for position in positions] for positions in self.random],
            },
            schema=SCHEMA,
        )

    def save(self, directory: Path) -> None:
        """Write ``neighbours.parquet``."""
        directory.mkdir(parents=True, exist_ok=True)
        pq.write_table(self.to_arrow(), directory / FILE)
