"""Packs the rows of a source: images into uncompressed tar shards, everything else into ``manifest.parquet``.

1. One pass over the rows writes the shards and a draft of the manifest, in which ``edited_from`` is still a key of the source.
2. A pass over the draft replaces keys by ids: an edit may come before its original, whose id is known only after the first pass.

Neither pass has more than a batch of records in memory, and the ids by key.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cm3leon.data.manifest import BATCH_ROWS, MANIFEST_SCHEMA, SourceRow
from cm3leon.utils.texts import as_unicode

_EDITED = MANIFEST_SCHEMA.get_field_index("edited_from")


class ShardWriter:
    """Writes tar shards ``images-00000.tar`` ... of about ``megabytes`` each; the same members give the same bytes."""

    def __init__(self, directory: Path, megabytes: float) -> None:
        self.directory, self.limit = directory, int(megabytes * 1e6)
        self.shards = self.images = self.bytes = 0
        self._archive: tarfile.TarFile | None = None
        self._filled = 0

    def add(self, name: str, data: bytes) -> str:
        """Append a member; returns its reference, ``"images-00000.tar/NAME"``."""
        if self._archive is None or (self._filled and self._filled + len(data) > self.limit):
            self.close()
            path = self.directory / f"images-{self.shards:05d}.tar"
            self._archive = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (closed by close)
            self.shards, self._filled = self.shards + 1, 0
        header = tarfile.TarInfo(name)  # owner 0 and time 0, so that the bytes do not depend on the machine
        header.size = len(data)
        header.mode = 0o644
        self._archive.addfile(header, io.BytesIO(data))
        self._filled += len(data)
        self.bytes += len(data)
        self.images += 1
        return f"images-{self.shards - 1:05d}.tar/{name}"

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()
            self._archive = None


def pack(rows: Iterable[SourceRow], directory: Path, shard_megabytes: float) -> dict[str, float]:
    """Write the rows to ``directory``, in place of the files of an earlier run; the manifest appears last.

    ``edited_from``, a key of the source, becomes the id of the row with that key; if there is none, the record has the problem
    ``unknown_original``, and if rows of several images have it ``ambiguous_original``. The same rows give the same bytes.

    Returns:
        Counts: rows, how many others were merged into them, images (conditions included), problems, shards, megabytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final, draft = directory / "manifest.parquet", directory / "manifest.draft.parquet"
    for old in [final, draft, *directory.glob("images-*.tar")]:
        old.unlink(missing_ok=True)
    shards = ShardWriter(directory, shard_megabytes)
    ids: dict[str, str] = {}  # by key of the source
    ambiguous: set[str] = set()
    count = merged = 0
    batch: list[dict[str, Any]] = []
    try:
        with pq.ParquetWriter(draft, MANIFEST_SCHEMA) as writer:
            for count, row in enumerate(rows, 1):
                batch.append(_record(row, count - 1, shards))
                merged += len(row.other_keys)
                for key in (row.key, *row.other_keys):
                    if ids.setdefault(key, batch[-1]["id"]) != batch[-1]["id"]:
                        ambiguous.add(key)
                if len(batch) == BATCH_ROWS:
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=MANIFEST_SCHEMA))
                    batch = []
            if batch:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=MANIFEST_SCHEMA))
        shards.close()
        problems = _resolve_edits(draft, final, ids, ambiguous)
    finally:
        shards.close()
        draft.unlink(missing_ok=True)
    megabytes = round(shards.bytes / 1e6, 3)
    counts = {"rows": count, "merged_rows": merged, "images": shards.images, "problems": problems}
    return {**counts, "shards": shards.shards, "megabytes": megabytes}


def _record(row: SourceRow, number: int, shards: ShardWriter) -> dict[str, Any]:
    """The manifest's record of a row; its images are added to the shards."""
    converted = ("id", "row", "image", "objects", "questions", "reasoning", "conditions")
    record: dict[str, Any] = {name: getattr(row, name) for name in MANIFEST_SCHEMA.names if name not in converted}
    record["row"] = number
    record.update(origin=as_unicode(row.origin), detail=row.detail and as_unicode(row.detail))  # names of files may be no Unicode
    record["objects"] = [{"label": label, "box": list(box)} for label, box in row.objects]
    record["reasoning"] = [asdict(problem) for problem in row.reasoning]
    record["questions"] = [{"question": question, "answers": list(answers)} for question, answers in row.questions]
    if row.image is None:
        content = json.dumps({**record, "key": row.key}, sort_keys=True, ensure_ascii=False).encode(errors="surrogatepass")
        record.update(id=_digest(content), image=None)
    else:
        record.update(id=_digest(row.image), image=shards.add(f"{number:09d}.{row.extension}", row.image))
    record["conditions"] = [
        {"kind": kind, "image": shards.add(f"{number:09d}.{re.sub('[^A-Za-z0-9]+', '-', kind)[:60]}.{index}.png", data)}
        for index, (kind, data) in enumerate(row.conditions.items())
    ]
    return record


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _known_form(key: str, ids: dict[str, str]) -> str:
    """A key as some row has it: as it is, without the decimals of a whole number that became a float, or as a path without detours."""
    part, own = re.fullmatch(r"(\d+:)?(.*)", key, re.DOTALL).groups("")  # type: ignore[union-attr]  # the part of a mixture
    forms = (key, part + re.sub(r"(?<=\d)\.0$", "", own), part + os.path.normpath(own))
    return next((form for form in forms if form in ids), key)


def _resolve_edits(draft: Path, final: Path, ids: dict[str, str], ambiguous: set[str]) -> int:
    """Copy the draft with ids for the keys in ``edited_from``; returns the number of records with a problem."""
    problems = 0
    partial = final.with_suffix(".part")
    with pq.ParquetFile(draft) as source, pq.ParquetWriter(partial, MANIFEST_SCHEMA) as writer:
        for batch in source.iter_batches(BATCH_ROWS):
            keys = batch.column(_EDITED).to_pylist()
            columns = {name: batch.column(name) for name in MANIFEST_SCHEMA.names}
            if any(key is not None for key in keys):
                problem, detail = columns["problem"].to_pylist(), columns["detail"].to_pylist()
                keys = [key and _known_form(key, ids) for key in keys]
                for row, key in enumerate(keys):
                    if key is None or (key in ids and key not in ambiguous):
                        continue
                    reason, found = ("ambiguous_original", "several rows have") if key in ambiguous else ("unknown_original", "no row has")
                    problem[row] = ",".join(filter(None, [problem[row], reason]))
                    detail[row] = "; ".join(filter(None, [detail[row], f"edited_from: {found} the key {key!r}"]))
                columns["edited_from"] = pa.array([ids.get(key) if key is not None else None for key in keys], pa.string())
                columns["problem"], columns["detail"] = pa.array(problem, pa.string()), pa.array(detail, pa.string())
            problems += len(batch) - columns["problem"].null_count
            writer.write_batch(pa.RecordBatch.from_arrays([columns[name] for name in MANIFEST_SCHEMA.names], schema=MANIFEST_SCHEMA))
    partial.replace(final)
    return problems
