"""Tokenized documents: Arrow IPC shards, memory-mapped.

Codes and texts stay on disk until they are read. What grows with the data in memory is the list of ids and the map from id to row, under
200 bytes a document, in each process that opens a store.

Columns (fixed): ``id`` (string), ``codes`` (fixed-size list of uint16), ``texts`` (list of lists of uint32: the captions).
Files are named after their split: ``train-00000.arrow``. ``conditions-train-00000.arrow`` holds the condition images of that split's
documents, without texts; an id is the document's with the kind behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

CONDITIONS_OF = "conditions-"
"""Before the name of a split: the condition images of its documents."""


def schema(tokens_per_image: int) -> pa.Schema:
    return pa.schema(
        [
            ("id", pa.string()),
            ("codes", pa.list_(pa.uint16(), tokens_per_image)),
            ("texts", pa.list_(pa.list_(pa.uint32()))),
        ]
    )


@dataclass(frozen=True)
class Document:
    """One tokenized document: image codes (h*w,) and the captions' text-tokenizer ids."""

    id: str
    codes: np.ndarray
    texts: list[np.ndarray]


def write_tokens(directory: Path, split: str, documents: Iterable[Document], tokens_per_image: int, shard_documents: int) -> int:
    """Write one split's shards in place of those an earlier run left; returns the number of documents."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob(f"{split}-*.arrow"):
        old.unlink()
    layout = schema(tokens_per_image)
    pending: list[Document] = []
    written = 0

    def flush() -> None:
        nonlocal written
        codes = np.stack([d.codes for d in pending]).astype(np.uint16)
        columns = [
            pa.array([d.id for d in pending]),
            pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), tokens_per_image),
            pa.array([[t.astype(np.uint32) for t in d.texts] for d in pending], type=layout.field("texts").type),
        ]
        path = directory / f"{split}-{written // shard_documents:05d}.arrow"
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


class TokenStore:
    """Random access to the tokenized documents of some splits.

    Raises:
        FileNotFoundError: if the directory holds no shard of a split asked for.
    """

    def __init__(self, directory: Path, splits: Sequence[str] = ("train",)) -> None:
        tables = []
        for split in splits:
            paths = sorted(Path(directory).glob(f"{split}-*.arrow"))
            if not paths:
                raise FileNotFoundError(f"{directory}: no tokens of split {split!r}; run: cm3leon tokenize")
            tables += [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths]
        self._table = pa.concat_tables(tables)
        self.ids: list[str] = self._table["id"].to_pylist()
        self._row = {name: row for row, name in enumerate(self.ids)}

    @staticmethod
    def holds(directory: Path, split: str) -> bool:
        """Whether the directory has tokens of a split."""
        return any(Path(directory).glob(f"{split}-*.arrow"))

    def __len__(self) -> int:
        return self._table.num_rows

    def __contains__(self, name: str) -> bool:
        return name in self._row

    def __getitem__(self, row: int) -> Document:
        codes = self._table["codes"][row].values.to_numpy()
        texts = [scalar.values.to_numpy() for scalar in self._table["texts"][row]]
        return Document(self.ids[row], codes, texts)

    def by_id(self, name: str) -> Document:
        """The document with this id.

        Raises:
            KeyError: if there is none.
        """
        if name not in self._row:
            raise KeyError(f"no tokenized document {name!r}")
        return self[self._row[name]]
