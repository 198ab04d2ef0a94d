"""Rows that are looked up by id: the same values as those of the whole table, in little memory."""

import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cm3leon.config.ingest_schema import ShapesConfig
from cm3leon.data import manifest as manifests
from cm3leon.data.manifest import read_manifest, read_table, records_of
from cm3leon.data.packing import pack
from cm3leon.data.rows_by_id import RowsById
from cm3leon.scenes import source as shapes
from cm3leon.sequence.tasks import TASK_COLUMNS


def test_records_are_those_of_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "BATCH_ROWS", 7)
    pack(shapes.rows(ShapesConfig(count=40, letters=0.3, edits=0.5, conditions=0.5, seed=1), tmp_path), tmp_path, 32)
    columns = [name for name in TASK_COLUMNS if name in pq.read_schema(tmp_path / "manifest.parquet").names]
    expected = records_of(read_manifest(tmp_path, columns=columns))
    found = RowsById(read_table(tmp_path, columns=columns))
    assert dict(found) == {record["id"]: record for record in expected} and list(found) == [record["id"] for record in expected]
    assert {type(value) for record in found.values() for value in record.values()} == {
        type(value) for record in expected for value in record.values()
    }
    assert len(found) == len(expected)
    assert RowsById(pa.table({"id": ["a"], "questions": pa.array([None], pa.list_(pa.string()))}))["a"] == {"id": "a", "questions": []}
    with pytest.raises(KeyError, match="nobody"):
        found["nobody"]


def test_rows_take_a_fifth_of_the_memory_of_objects() -> None:
    count = 20_000
    table = pa.table(
        {"id": [f"{row:016x}" for row in range(count)], "objects": [[{"label": f"a {row}", "box": [0.1] * 4}] * 3 for row in range(count)]}
    )
    tracemalloc.start()
    rows = RowsById(table)
    lean, _ = tracemalloc.get_traced_memory()
    objects = table.to_pylist()
    fat = tracemalloc.get_traced_memory()[0] - lean
    for document_id in rows:
        rows[document_id]
    tracemalloc.stop()
    assert len(objects) == count and table.nbytes + lean < fat / 5
    assert rows._cached.cache_info().currsize < count, "few rows are kept as objects"
