"""Tokenized documents in memory-mapped Arrow IPC shards.

Codes and captions stay on disk until they are read. Memory grows only with the list of ids and the map from id to row, under 200 bytes per
document, in each process that opens a store.

Columns (fixed): ``id`` (string), ``codes`` (fixed-size list of uint16), ``texts`` (list of lists of uint32, the captions).
Shards are named after their split, ``train-00000.arrow``. ``conditions-train-00000.arrow`` holds the condition images of that split's
documents, without captions, under the ids of :func:`cm3leon.sequence.tasks.condition_key`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from cm3leon.utils.files import read_file

CONDITION_PREFIX = "conditions-"
"""Prefix of a split's name for the condition images of its documents."""


def schema(tokens_per_image: int) -> pa.Schema:
    """The columns of a shard."""
    return pa.schema(
        [
            ("id", pa.string()),
            ("codes", pa.list_(pa.uint16(), tokens_per_image)),
            ("texts", pa.list_(pa.list_(pa.uint32()))),
        ]
    )


@dataclass(frozen=True)
class Document:
    """One tokenized document: image codes (tokens_per_image,) and the text-tokenizer ids of each caption."""

    id: str
    codes: np.ndarray
    captions: list[np.ndarray]


def clear_tokens(directory: Path) -> None:
    """Remove the shards of an earlier run; those of a longer one would be read as part of the next."""
    for old in directory.glob("*.arrow"):
        old.unlink()


def write_tokens(
    directory: Path,
    split: str,
    documents: Iterable[Document],
    tokens_per_image: int,
    shard_documents: int,
    first: int = 0,
    every: int = 1,
) -> int:
    """Write shards of a split, beside those that are there (:func:`clear_tokens`); returns the number of documents.

    Args:
        first, every: the shards' numbers are ``first``, ``first + every`` and so on.
    """
    directory.mkdir(parents=True, exist_ok=True)
    numbers = itertools.count(first, every)
    layout = schema(tokens_per_image)
    pending: list[Document] = []
    written = 0

    def flush() -> None:
        nonlocal written
        codes = np.stack([d.codes for d in pending]).astype(np.uint16)
        columns = [
            pa.array([d.id for d in pending]),
            pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), tokens_per_image),
            pa.array([[t.astype(np.uint32) for t in d.captions] for d in pending], type=layout.field("texts").type),
        ]
        path = directory / f"{split}-{next(numbers):05d}.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, layout) as writer:
            writer.write_table(pa.table(columns, schema=layout), max_chunksize=4096)
        written += len(pending)
        pending.clear()

    for document in documents:
        pending.append(document)
        if len(pending) == shard_documents:
            flush()
    if pending:
        flush()
    return written


def _read_shard(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


class TokenStore:
    """Random access to the tokenized documents of some splits.

    Raises:
        FileNotFoundError: if the directory has no shard of a requested split.
        DamagedFileError: if a shard is truncated.
    """

    def __init__(self, directory: Path, splits: Sequence[str] = ("train",)) -> None:
        tables = []
        for split in splits:
            paths = sorted(Path(directory).glob(f"{split}-*.arrow"))
            if not paths:
                raise FileNotFoundError(f"{directory}: no tokens of split {split!r}; run: cm3leon tokenize")
            tables += [read_file(path, _read_shard, "cm3leon tokenize") for path in paths]
        self._table = pa.concat_tables(tables)
        self.ids: list[str] = self._table["id"].to_pylist()
        self._row_of = {document_id: row for row, document_id in enumerate(self.ids)}

    @staticmethod
    def holds(directory: Path, split: str) -> bool:
        """True if the directory has tokens of a split."""
        return any(Path(directory).glob(f"{split}-*.arrow"))

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, document_id: str) -> bool:
        return document_id in self._row_of

    def __getitem__(self, row: int) -> Document:
        codes = self._table["codes"][row].values.to_numpy()
        captions = [scalar.values.to_numpy() for scalar in self._table["texts"][row]]
        return Document(self.ids[row], codes, captions)

    def by_id(self, document_id: str) -> Document:
        """The document with this id.

        Raises:
            KeyError: if there is none.
        """
        if document_id not in self._row_of:
            raise KeyError(f"no tokenized document {document_id!r}")
        return self[self._row_of[document_id]]
