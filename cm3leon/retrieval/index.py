"""The memory bank: a FAISS index with one vector per document, and the captions and credits of the documents.

A document's text is its first caption, which is also the one shown with it.

Shapes: n documents or queries, d dimensions, k results.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cm3leon.data.manifest import first_caption
from cm3leon.retrieval.faiss_index import Kind, build_index
from cm3leon.retrieval.vectors import IMAGES, TEXTS, document_vectors
from cm3leon.utils.errors import UserError
from cm3leon.utils.files import read_file, read_json

INDEX, DOCUMENTS, SETTINGS = "index.faiss", "documents.parquet", "config.json"
FILES = (INDEX, DOCUMENTS, SETTINGS, TEXTS, IMAGES)
MADE_BY = "cm3leon index"
BANK_COLUMNS = ["id", "caption", "licence", "attribution", "source"]


def multimodal_records(manifest: pd.DataFrame) -> pd.DataFrame:
    """Records with an image and a non-blank first caption, which is added as the column ``caption``: those that can be retrieved."""
    first = manifest["captions"].map(lambda captions: first_caption(captions).strip())
    return manifest.assign(caption=first)[manifest["image"].notna() & first.ne("")].reset_index(drop=True)


def check_documents(documents: pd.DataFrame) -> None:
    """Raise UserError if there are no documents; ValueError if an id repeats or a caption is empty."""
    if documents.empty:
        raise UserError("the memory bank would be empty: no train document has both a caption and an image")
    if documents["id"].duplicated().any():
        raise ValueError(f"document id {documents['id'][documents['id'].duplicated()].iloc[0]!r} occurs twice")
    if documents["caption"].isna().any() or (documents["caption"].str.strip() == "").any():
        raise ValueError("only documents with a caption and an image can be retrieved; drop the others before indexing")


def clear_bank(directory: Path) -> None:
    """Remove the bank of an earlier run, so that its index is not taken for that of new embeddings if these are never indexed.

    A bank that is loaded keeps what is mapped from the files.
    """
    for name in FILES:
        (directory / name).unlink(missing_ok=True)


class MemoryBank:
    """Documents that can be retrieved. Row i of ``documents`` is vector i of the index, its position."""

    def __init__(self, index: Any, documents: pd.DataFrame, text: np.ndarray, image: np.ndarray, settings: dict[str, Any]) -> None:
        if not len(documents) == len(text) == len(image) == index.ntotal:
            counts = f"{index.ntotal} vectors, {len(documents)} documents, {len(text)} text and {len(image)} image embeddings"
            raise ValueError(f"the memory bank is inconsistent: {counts}")
        self.index, self.documents, self.text, self.image, self.settings = index, documents, text, image, settings
        self.position = {document: position for position, document in enumerate(documents["id"])}

    @classmethod
    def build(cls, documents: pd.DataFrame, text: np.ndarray, image: np.ndarray, kind: Kind, encoder: str) -> MemoryBank:
        """Index documents by their embeddings.

        Args:
            documents: rows with :data:`BANK_COLUMNS`, all with a caption and an image (only multimodal documents are retrieved).
            text, image: unit vectors ``(n, d)``. They are kept as float16, and the index is built from the rounded vectors, so that scores
                computed from the stored embeddings agree with it.
            encoder: fingerprint of the encoder that made them.

        Raises:
            UserError: if there are no documents, or an approximate index finds too few of the nearest.
            ValueError: if an id repeats, a caption is empty, or counts differ.
        """
        check_documents(documents)
        text, image = np.asanyarray(text, dtype=np.float16), np.asanyarray(image, dtype=np.float16)
        settings = {"encoder": encoder, "documents": len(documents), "dimensions": int(text.shape[1])}
        index, found = build_index(text, image, kind)
        return cls(index, documents[BANK_COLUMNS].reset_index(drop=True), text, image, settings | found)

    @classmethod
    def load(cls, directory: str | Path) -> MemoryBank:
        """Read a bank written by :meth:`save`; index and embeddings are memory-mapped.

        Raises:
            FileNotFoundError: if the directory holds none.
            DamagedFileError: if a file of it is truncated.
        """
        import faiss

        directory = Path(directory)
        for name in FILES:
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory / name}: no memory bank here; run: {MADE_BY}")
        text, image = (
            read_file(directory / name, partial(np.load, mmap_mode="r", allow_pickle=False), MADE_BY) for name in (TEXTS, IMAGES)
        )
        settings = read_file(directory / SETTINGS, read_json, MADE_BY)
        index = read_file(directory / INDEX, lambda path: faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC), MADE_BY)
        return cls(index, read_file(directory / DOCUMENTS, pd.read_parquet, MADE_BY), text, image, settings)

    def save(self, directory: str | Path) -> None:
        """Write ``index.faiss``, ``documents.parquet``, ``text_embeddings.npy``, ``image_embeddings.npy`` and ``config.json``.

        Files are replaced, not overwritten: index and embeddings may be mapped from them, by this bank too.
        """
        import faiss

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        writers: dict[str, Callable[[Path], object]] = {
            INDEX: lambda path: faiss.write_index(self.index, str(path)),
            DOCUMENTS: lambda path: self.documents.to_parquet(path, index=False),
            TEXTS: partial(_save_array, self.text),
            IMAGES: partial(_save_array, self.image),
            SETTINGS: lambda path: path.write_text(json.dumps(self.settings, indent=2, sort_keys=True) + "\n"),
        }
        for name, write in writers.items():
            part = directory / f"{name}.part"
            write(part)
            part.replace(directory / name)

    def __len__(self) -> int:
        return len(self.documents)

    def positions_of(self, ids: pd.Series) -> np.ndarray:
        """int64 ``(n,)``: positions of documents in the bank; -1 for those that are not in it."""
        return ids.map(self.position).fillna(-1).to_numpy(dtype=np.int64)

    def check_encoder(self, fingerprint: str) -> None:
        """Raise UserError unless the bank was built with the encoder of this fingerprint: vectors of two encoders cannot be compared."""
        if self.settings["encoder"] != fingerprint:
            raise UserError(f"the memory bank was made with encoder {self.settings['encoder']}, not {fingerprint}; run: cm3leon index")

    def vectors(self, positions: np.ndarray) -> np.ndarray:
        """float32 ``(..., d)`` unit document vectors at ``positions``. Position -1 gives the last document's: callers mask it."""
        return document_vectors(self.text[positions], self.image[positions])

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` documents of highest inner product with each of ``vectors`` ``(n, d)``.

        Returns:
            Scores float32 ``(n, k)`` in descending order and positions int64 ``(n, k)``; -inf and -1 where fewer were found.
        """
        k = min(k, len(self))
        scores, positions = self.index.search(np.ascontiguousarray(vectors, dtype=np.float32), k)
        return np.where(positions < 0, -np.inf, scores).astype(np.float32), positions


def _save_array(array: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:  # np.save would add a suffix to the path
        np.save(file, array, allow_pickle=False)
