"""The memory bank: a FAISS index with one vector per document, and the captions and credits of the documents.

A document's vector is the mean of its L2-normalized text and image embeddings (paper, section 2.1), normalized again (RA-CM3, section 3.2).
The inner product of two documents, or of a query and a document, is then a cosine, and one bound excludes near-duplicates. The text is the
document's first caption, which is also the one shown with it.

Shapes: n documents or queries, d dimensions, k results.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from cm3leon.data.manifest import first_caption
from cm3leon.utils.errors import UserError
from cm3leon.utils.files import read_file, read_json

INDEX, DOCUMENTS, SETTINGS = "index.faiss", "documents.parquet", "config.json"
TEXTS, IMAGES = "text_embeddings.npy", "image_embeddings.npy"
MADE_BY = "cm3leon index"
Kind = Literal["flat", "ivf", "hnsw"]
BANK_COLUMNS = ["id", "caption", "licence", "attribution", "source"]


def normalize(vectors: np.ndarray) -> np.ndarray:
    """float32 ``(..., d)``, L2-normalized; zero vectors stay zero."""
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def document_vectors(text: np.ndarray, image: np.ndarray) -> np.ndarray:
    """float32 ``(..., d)`` unit vectors of documents from their unit text and image vectors: ``(t + i) / |t + i|``."""
    return normalize(np.asarray(text, dtype=np.float32) + np.asarray(image, dtype=np.float32))


def multimodal_records(manifest: pd.DataFrame) -> pd.DataFrame:
    """Records with an image and a non-blank first caption, which is added as the column ``caption``: those that can be retrieved."""
    first = manifest["captions"].map(lambda captions: first_caption(captions).strip())
    return manifest.assign(caption=first)[manifest["image"].notna() & first.ne("")].reset_index(drop=True)


def build_index(vectors: np.ndarray, kind: Kind) -> Any:
    """A FAISS inner-product index: ``flat`` is exact, ``ivf`` and ``hnsw`` are approximate and for large banks.

    The same vectors give the same index, byte for byte.
    """
    import faiss

    count, width = vectors.shape
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    index: Any
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 200
        index.hnsw.efSearch = 512
        threads = faiss.omp_get_max_threads()  # one thread: the graph depends on the order of insertion
        faiss.omp_set_num_threads(1)
        try:
            index.add(vectors)
        finally:
            faiss.omp_set_num_threads(threads)
        return index
    if kind == "ivf":
        lists = max(1, min(int(4 * count**0.5), count // 39))  # FAISS's k-means wants at least 39 vectors per centroid
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add(vectors)
        index.nprobe = max(1, lists // 8)
        return index
    index = faiss.IndexFlatIP(width)
    index.add(vectors)
    return index


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
            UserError: if there are no documents; ValueError: if an id repeats, a caption is empty, or counts differ.
        """
        if documents.empty:
            raise UserError("the memory bank would be empty: no train document has both a caption and an image")
        if documents["id"].duplicated().any():
            raise ValueError(f"document id {documents['id'][documents['id'].duplicated()].iloc[0]!r} occurs twice")
        if documents["caption"].isna().any() or (documents["caption"].str.strip() == "").any():
            raise ValueError("only documents with a caption and an image can be retrieved; drop the others before indexing")
        text, image = np.asarray(text, dtype=np.float16), np.asarray(image, dtype=np.float16)
        settings = {"kind": kind, "encoder": encoder, "documents": len(documents), "dimensions": int(text.shape[1])}
        index = build_index(document_vectors(text, image), kind)
        return cls(index, documents[BANK_COLUMNS].reset_index(drop=True), text, image, settings)

    @classmethod
    def load(cls, directory: str | Path) -> MemoryBank:
        """Read a bank written by :meth:`save`; embeddings are memory-mapped.

        Raises:
            FileNotFoundError: if the directory holds none.
            DamagedFileError: if a file of it is truncated.
        """
        import faiss

        directory = Path(directory)
        for name in (INDEX, DOCUMENTS, SETTINGS, TEXTS, IMAGES):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory / name}: no memory bank here; run: {MADE_BY}")
        text, image = (
            read_file(directory / name, partial(np.load, mmap_mode="r", allow_pickle=False), MADE_BY) for name in (TEXTS, IMAGES)
        )
        settings = read_file(directory / SETTINGS, read_json, MADE_BY)
        index = read_file(directory / INDEX, lambda path: faiss.read_index(str(path)), MADE_BY)
        return cls(index, read_file(directory / DOCUMENTS, pd.read_parquet, MADE_BY), text, image, settings)

    def save(self, directory: str | Path) -> None:
        """Write ``index.faiss``, ``documents.parquet``, ``text_embeddings.npy``, ``image_embeddings.npy`` and ``config.json``."""
        import faiss

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        faiss.write_index(self.index, str(directory / INDEX))
        self.documents.to_parquet(directory / DOCUMENTS, index=False)
        np.save(directory / TEXTS, self.text, allow_pickle=False)
        np.save(directory / IMAGES, self.image, allow_pickle=False)
        (directory / SETTINGS).write_text(json.dumps(self.settings, indent=2, sort_keys=True) + "\n")

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
