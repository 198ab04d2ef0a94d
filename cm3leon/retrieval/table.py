"""The neighbor table that training reads: the retrieved documents of every document of the collection, and random ones for comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cm3leon.config.schema import RetrieveConfig
from cm3leon.retrieval.index import MemoryBank
from cm3leon.retrieval.strategy import Neighbor, drop_words, find, sample_random, search_batch
from cm3leon.retrieval.vectors import chunks, document_vectors
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


class NeighborTable:
    """``neighbours.parquet`` in ``directory``, written a part of the queries at a time; a context that closes the file.

    Until its end the file has another name, so that one which was interrupted is not taken for the whole.

    Args:
        encode_texts: of the bank's encoder.
        seed: of the dropped words and of the random documents.
    """

    def __init__(
        self, directory: Path, bank: MemoryBank, encode_texts: Callable[[Sequence[str]], np.ndarray], config: RetrieveConfig, seed: int
    ) -> None:
        self.bank, self.encode_texts, self.config, self.seed = bank, encode_texts, config, seed
        self.names = bank.documents["id"].to_numpy()
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / FILE
        self.partial = self.path.with_suffix(".part")
        self.path.unlink(missing_ok=True)
        self.file = pq.ParquetWriter(self.partial, SCHEMA)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.file.close()
        if kind is None:
            self.partial.replace(self.path)

    def add(self, records: pd.DataFrame, text: np.ndarray, image: np.ndarray) -> list[list[Neighbor]]:
        """Retrieve for records, by their captions with some words dropped and by their images; returns what was found.

        Args:
            records: rows with ``id`` and ``caption``.
            text, image: float32 ``(n, d)`` unit vectors of the whole captions and of the images.
        """
        document, own = document_vectors(text, image), self.bank.positions_of(records["id"])
        found: list[list[Neighbor]] = []
        random: list[list[int]] = []
        with progress("retrieving", len(records), "documents") as meter:
            for rows in chunks(len(records), search_batch(text.shape[1])):
                ids, captions = (records[column].iloc[rows].tolist() for column in ("id", "caption"))
                queries = [
                    drop_words(caption, self.config.query_drop, self.seed, name) for caption, name in zip(captions, ids, strict=True)
                ]
                by_text = self.encode_texts(queries)
                found += find(self.bank, self.config, text=by_text, image=image[rows], document=document[rows], own=own[rows])
                counts = [len(neighbors) for neighbors in found[rows]]
                keys = [f"{self.seed}/{name}" for name in ids]
                random += sample_random(self.bank, self.config, document=document[rows], own=own[rows], counts=counts, keys=keys)
                meter.advance(len(ids))
        self.file.write_table(self._rows(records["id"].tolist(), found, random))
        return found

    def _rows(self, ids: list[str], found: list[list[Neighbor]], random: list[list[int]]) -> pa.Table:
        """Rows in :data:`SCHEMA`, with bank positions replaced by ids."""
        return pa.table(
            {
                "id": ids,
                "neighbours": [[self.names[neighbor.position] for neighbor in neighbors] for neighbors in found],
                "scores": [[neighbor.score for neighbor in neighbors] for neighbors in found],
                "modalities": [[neighbor.modality for neighbor in neighbors] for neighbors in found],
                "random": [[self.names[position] for position in positions] for positions in random],
            },
            schema=SCHEMA,
        )
