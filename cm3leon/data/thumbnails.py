"""Thumbnails by which near-duplicates are found: made once, in ``validate``, and kept for the leakage check of ``evaluate``.

``thumbnails.parquet`` has a row for each record of the validated manifest, in its order: ``id``, and ``thumbnail``, the bytes of
:func:`thumbnail_of`. The same records give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cm3leon.utils.errors import UserError
from cm3leon.utils.files import read_file

SIDE = 8
FEATURES = SIDE * SIDE * 3
FILE = "thumbnails.parquet"
SCHEMA = pa.schema([("id", pa.string()), ("thumbnail", pa.binary(FEATURES))])


class ThumbnailError(UserError):
    """The thumbnails of a validated manifest cannot be used."""


def thumbnail_of(image: Image.Image) -> bytes:
    """``SIDE`` x ``SIDE`` RGB bytes, each the mean of its area."""
    return image.resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()


def stack(thumbnails: Sequence[bytes]) -> np.ndarray:
    """uint8 (n, ``FEATURES``)."""
    return np.frombuffer(b"".join(thumbnails), dtype=np.uint8).reshape(-1, FEATURES)


def write_thumbnails(directory: Path, ids: Sequence[str], thumbnails: Sequence[bytes]) -> None:
    """Write ``thumbnails.parquet`` to ``directory``."""
    pq.write_table(pa.table([list(ids), list(thumbnails)], schema=SCHEMA), directory / FILE)


def read_thumbnails(directory: Path, ids: Sequence[str]) -> np.ndarray:
    """Thumbnails of the records ``ids``, in their order: uint8 (n, ``FEATURES``).

    Raises:
        ThumbnailError: if ``directory`` has no thumbnails, or none of one of the records.
    """
    path = directory / FILE
    if not path.is_file():
        raise ThumbnailError(f"{path} does not exist; run validate again, which writes it: cm3leon validate")
    table = read_file(path, partial(pq.read_table, schema=SCHEMA), "cm3leon validate")
    thumbnails = dict(zip(table["id"].to_pylist(), table["thumbnail"].to_pylist(), strict=True))
    missing = [record_id for record_id in ids if record_id not in thumbnails]
    if missing:
        raise ThumbnailError(
            f"{path} lacks {len(missing)} records of the manifest, for example {missing[0]}; run validate again: cm3leon validate"
        )
    return stack([thumbnails[record_id] for record_id in ids])
