"""The manifest: one record a row, and the image shards that it refers to.

Sources yield :class:`SourceRow`; ``ingest`` packs their images into tar shards and writes ``manifest.parquet`` with
:data:`MANIFEST_SCHEMA`; later stages read records with :func:`read_manifest` and images with :class:`ImageStore`.
"""

from __future__ import annotations

import tarfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cm3leon.config.paths import VALIDATED
from cm3leon.data.images import decode
from cm3leon.utils.errors import UserError
from cm3leon.utils.files import read_file
from cm3leon.utils.texts import is_blank

SPLITS = ("train", "val", "test")

OBJECT = pa.struct([("label", pa.string()), ("box", pa.list_(pa.float32()))])
PROBLEM = pa.struct(
    [
        ("question", pa.string()),
        ("context", pa.string()),
        ("options", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("explanation", pa.string()),
    ]
)
QUESTION = pa.struct([("question", pa.string()), ("answers", pa.list_(pa.string()))])
CONDITION = pa.struct([("kind", pa.string()), ("image", pa.string())])

MANIFEST_SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # first 16 hex digits of the SHA-256 of the image file; of the row if there is no image
        ("row", pa.int64()),  # position in the source, from 0
        ("origin", pa.string()),  # location in the source: file and line, or scene number
        ("image", pa.string()),  # "images-00000.tar/000001.png": shard and member; null when the source could not supply it
        ("captions", pa.list_(pa.string())),
        ("licence", pa.string()),
        ("attribution", pa.string()),
        ("source", pa.string()),
        ("group", pa.string()),  # records of one group are in one split; null: no group
        ("problem", pa.string()),  # reason codes that the source found (missing, path_outside_root ...), separated by commas, else null
        ("detail", pa.string()),  # for the message: what the problem is
        ("long_caption", pa.string()),
        ("objects", pa.list_(OBJECT)),  # boxes are x0, y0, x1, y1 in pixels of the stored image
        ("questions", pa.list_(QUESTION)),
        ("reasoning", pa.list_(PROBLEM)),  # multiple-choice questions with explanations
        ("instruction", pa.string()),
        ("edited_from", pa.string()),  # id of the record of which this one is an edit
        ("conditions", pa.list_(CONDITION)),
        ("text_in_image", pa.string()),
        ("split", pa.string()),  # as the source states it: train, val or test; null: validate draws one
        ("weight", pa.float32()),  # how often the record is seen in training, relative to one of weight 1; above 0, and null is 1
    ]
)
"""Columns of ``data/raw/manifest.parquet``."""

VALIDATED_SCHEMA = pa.schema([*MANIFEST_SCHEMA, ("width", pa.int32()), ("height", pa.int32())])
"""Columns of ``data/validated/manifest.parquet``; width and height are those of the image that :meth:`ImageStore.open` returns, pixels."""


BATCH_ROWS = 2048
"""Records of a row group of a manifest. Arrow reads no row group with more than 2 GiB of texts in lists, such as captions."""


@dataclass(frozen=True)
class Problem:
    """A multiple-choice question: ``answer`` is one of ``options``, and ``explanation`` says why."""

    question: str
    options: list[str]
    answer: str
    explanation: str
    context: str = ""


@dataclass
class SourceRow:
    """One record as a source yields it, before images are packed.

    ``image`` and the values of ``conditions`` are encoded image files (PNG, JPEG ...). ``key`` names the row in its source, ``other_keys``
    those that were merged into it, and ``edited_from`` is the key of the row of which it is an edit. ``problem`` has reason codes,
    separated by commas, if the source found an error in the row, and ``detail`` describes it; ``image`` is None if there is no file.
    ``weight`` says how often the record is seen in training, relative to one of weight 1.
    """

    key: str
    origin: str
    image: bytes | None
    captions: list[str]
    licence: str | None
    attribution: str | None
    source: str
    extension: str = "png"
    group: str | None = None
    problem: str | None = None
    long_caption: str | None = None
    objects: list[tuple[str, tuple[float, float, float, float]]] = field(default_factory=list)
    questions: list[tuple[str, list[str]]] = field(default_factory=list)
    reasoning: list[Problem] = field(default_factory=list)
    instruction: str | None = None
    edited_from: str | None = None
    conditions: dict[str, bytes] = field(default_factory=dict)
    text_in_image: str | None = None
    split: str | None = None
    detail: str | None = None
    other_keys: list[str] = field(default_factory=list)
    weight: float = 1.0


class ManifestError(UserError):
    """A manifest or an image reference cannot be read."""


def first_caption(captions: Iterable[str]) -> str:
    """The first caption that is not blank; "" if there is none, as in no record that ``validate`` has accepted."""
    return next((text for text in map(str, captions) if not is_blank(text)), "")


def records_of(manifest: pd.DataFrame) -> list[dict[str, Any]]:
    """The records of a manifest, in its order, each a dict from column to value."""
    return cast("list[dict[str, Any]]", manifest.to_dict("records"))  # the names of a manifest's columns are texts


def read_manifest(path: str | Path, split: str | None = None, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read the records of a manifest, in file order.

    Null texts are None, lists and structs are Python lists and dicts, and null lists are empty, so that no code needs to check for NaN.

    Args:
        path: a file, or a directory with a ``manifest.parquet``.
        split: read the records of this split only.
        columns: read these columns only.

    Raises:
        ManifestError: if the file does not exist, or there is no such split.
        DamagedFileError: if it is truncated.
    """
    table = read_table(path, split, columns)
    data: dict[str, Any] = {}
    for name in table.column_names:
        column = table.column(name)
        if pa.types.is_list(column.type):
            data[name] = pd.Series([value or [] for value in column.to_pylist()], dtype=object)
        elif pa.types.is_string(column.type):
            data[name] = pd.Series(column.to_pylist(), dtype=object)
        else:
            data[name] = column.to_pandas()
    return pd.DataFrame(data)


def read_table(path: str | Path, split: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """:func:`read_manifest` as an Arrow table, which takes a fifth of the memory or less; nulls stay nulls."""
    path = Path(path)
    path = path / "manifest.parquet" if path.is_dir() else path
    if not path.is_file():
        raise ManifestError(f"{path} does not exist; manifests are written by: cm3leon ingest, cm3leon validate")
    if split is not None and split not in SPLITS:
        raise ManifestError(f"there is no split {split!r}; splits are {', '.join(SPLITS)}")
    filters = None if split is None else [("split", "=", split)]
    read = partial(pq.read_table, columns=None if columns is None else list(columns), filters=filters)
    return read_file(path, read, "cm3leon validate" if path.is_relative_to(VALIDATED) else "cm3leon ingest")


def write_manifest(path: Path, records: pd.DataFrame, schema: pa.Schema) -> None:
    """Write the columns of ``schema``, of which the records have each, as :func:`read_manifest` gives them."""
    columns = records[schema.names]
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(columns), BATCH_ROWS):
            batch = records_of(columns.iloc[start : start + BATCH_ROWS])
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


class _Members(NamedTuple):
    """The members of a shard in the order of their names; arrays, as each process that reads images has those of all shards."""

    names: np.ndarray  # encoded
    offsets: np.ndarray  # bytes
    sizes: np.ndarray  # bytes

    def place(self, name: str) -> tuple[int, int] | None:
        """Offset and size of a member; None if there is none of this name."""
        encoded = np.bytes_(name.encode())
        position = int(np.searchsorted(self.names, encoded))
        if position == len(self.names) or self.names[position] != encoded:
            return None
        return int(self.offsets[position]), int(self.sizes[position])


class ImageStore:
    """Random reads from uncompressed tar shards, without extracting them.

    A reference is ``"SHARD/MEMBER"``, as in the manifest. The offsets of a shard are indexed at its first read, in some 40 bytes an image.
    Each read opens the shard (about 10 microseconds), so that one store serves any number of threads, and forked or pickled workers.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._members: dict[str, _Members] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["root"])  # type: ignore[misc]

    def _index(self, shard: str) -> _Members:
        with self._lock:
            if shard not in self._members:
                if "/" in shard or not shard.endswith(".tar"):
                    raise ManifestError(f"{shard!r} is not a shard; an image reference looks like images-00000.tar/000001.png")
                try:
                    with tarfile.open(self.root / shard, "r:") as archive:
                        found = sorted((member.name.encode(), member.offset_data, member.size) for member in archive)
                except FileNotFoundError:
                    raise ManifestError(f"image shard {self.root / shard} does not exist; run: cm3leon ingest") from None
                except tarfile.TarError as error:
                    raise ManifestError(f"image shard {self.root / shard} is damaged ({error}); run again: cm3leon ingest") from None
                names, offsets, sizes = zip(*found, strict=True) if found else ((), (), ())
                self._members[shard] = _Members(np.array(names, dtype=np.bytes_), np.array(offsets, np.int64), np.array(sizes, np.int64))
            return self._members[shard]

    def read(self, ref: str) -> bytes:
        """The bytes of an encoded image.

        Raises:
            ManifestError: if the shard or the member does not exist, or the shard is truncated.
        """
        shard, _, member = ref.partition("/")
        place = (self._members.get(shard) or self._index(shard)).place(member)
        if place is None:
            raise ManifestError(f"image shard {self.root / shard} has no member {member!r}; run again: cm3leon ingest")
        offset, size = place
        with (self.root / shard).open("rb") as file:  # buffered: a single read of the system ends after 2 GiB
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise ManifestError(f"image shard {self.root / shard} is truncated at {member!r}; run again: cm3leon ingest")
        return data

    def open(self, ref: str) -> Image.Image:
        """The decoded image: RGB, EXIF orientation applied, transparency composited on white.

        Raises:
            ManifestError: as :meth:`read`.
            ImageError: if the file cannot be decoded.
        """
        return decode(self.read(ref))
